"""The colour of the noise: gain per radial frequency band, and white noise coloured by it.

FLUX.2 latents are 2x2 patches packed into channels; their true spectrum lives on the unpatchified
grid, so noise is coloured there and packed again (docs/sampling.md, "Where it is coloured").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .params import CNSParams

PAIRS = 6  # planes filtered at a time, two in each complex FFT


def unpatchify(latent: Tensor, patch_size: int) -> Tensor:
    """``(c pi pj) i j -> c (i pi) (j pj)``: [B, C, h, w] to [B, C / p², h·p, w·p].

    >>> unpatchify(torch.zeros(1, 128, 4, 6), 2).shape
    torch.Size([1, 32, 8, 12])

    Raises:
        ValueError: patch_size is above 1, and the latent has not four axes or its channels are not a multiple of
            ``patch_size²``.
    """
    if patch_size == 1:
        return latent
    _check_channels(latent, patch_size)
    batch, channels, height, width = latent.shape
    grid = latent.reshape(batch, channels // patch_size**2, patch_size, patch_size, height, width)
    return grid.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * patch_size, width * patch_size)


def patchify(grid: Tensor, patch_size: int) -> Tensor:
    """The inverse of `unpatchify`: [B, C, H, W] to [B, C·p², H / p, W / p].

    >>> patchify(torch.zeros(1, 32, 8, 12), 2).shape
    torch.Size([1, 128, 4, 6])

    Raises:
        ValueError: patch_size is above 1, and the grid has not four axes or its height or width is not a multiple of
            ``patch_size``.
    """
    if patch_size == 1:
        return grid
    if grid.ndim != 4 or grid.shape[-2] % patch_size or grid.shape[-1] % patch_size:
        raise ValueError(
            f"grid has shape {list(grid.shape)}; patch_size {patch_size} needs [batch, channels, height, width] "
            f"with height and width multiples of {patch_size}."
        )
    batch, channels, height, width = grid.shape
    split = grid.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // patch_size, width // patch_size)


def radial_bands(height: int, width: int, num_bins: int) -> tuple[Tensor, Tensor]:
    """Band of every mode, and how many modes of the full FFT grid each band has.

    ``band = floor(r / r_max · (bins - 1))``, in float32 as the authors' ``cns_sde`` does it, so that no
    mode changes its band by rounding.

    >>> radial_bands(2, 2, 8)[0].tolist()
    [[0, 4], [4, 7]]

    Args:
        height, width: give the size of the unpatchified grid.
        num_bins: counts the bands.

    Returns:
        index int64 [height, width // 2 + 1] for the ``rfft2`` grid, count float64 [num_bins].
    """
    fy, fx = (torch.fft.fftfreq(side, dtype=torch.float32, device="cpu") for side in (height, width))
    radius = torch.sqrt(fx[None, :] ** 2 + fy[:, None] ** 2)
    radius = radius / radius.max().clamp(min=torch.finfo(radius.dtype).tiny)
    index = (radius * (num_bins - 1)).long().clamp(0, num_bins - 1)
    count = torch.bincount(index.flatten(), minlength=num_bins).double()
    return index[:, : width // 2 + 1].contiguous(), count


def alpha_tilt(params: CNSParams, step: float, steps: int) -> float:
    """α of a step: from ``alpha_tilt_start`` at the first to ``alpha_tilt_end`` at the last of ``steps``.

    >>> alpha_tilt(CNSParams(), 0, 28)
    0.15

    Args:
        params: give both ends and the curve between them.
        step: counts from 0; a fraction is a position between two steps.
        steps: counts the steps of the schedule.
    """
    p = step / max(steps - 1, 1)
    if params.alpha_exp_interp:
        p = math.expm1(params.alpha_exp_sharpness * p) / math.expm1(params.alpha_exp_sharpness)
    return params.alpha_tilt_start + p * (params.alpha_tilt_end - params.alpha_tilt_start)


def band_power(params: CNSParams, gamma_row: Tensor, alpha: float, count: Tensor) -> Tensor:
    """β² per band, normalised so that its mean over all modes of the grid is 1.

    ``endpoint``: β² ∝ max(1 - γ/d, 0)^p · e^{αf}; ``authors`` (``cns_sde`` of the paper's code):
    β ∝ (max(1 - γ/d, 0) · e^{αf})^p. Where every residual on the grid is 0, the tilt alone.

    Args:
        params: give the formula, the divider and the power.
        gamma_row: [bins], holds the progress of each band.
        alpha: tilts the spectrum, see `alpha_tilt`.
        count: [bins], holds the modes of each band, from `radial_bands`.

    Returns:
        float64 [bins].
    """
    residual = (1.0 - gamma_row.double() / params.gamma_divider).clamp(min=0.0)
    position = torch.linspace(0.0, 1.0, len(gamma_row), dtype=torch.float64, device=gamma_row.device)
    tilt = torch.exp(alpha * position) if params.alpha_use_fnorm else torch.ones_like(position)
    if params.formula == "authors":
        residual, tilt = residual ** (2 * params.power_gamma), tilt ** (2 * params.power_gamma)
    else:
        residual = residual**params.power_gamma
    power = residual * tilt
    if not torch.any(power * count > 0):
        power = tilt
    return power * (count.sum() / (power * count).sum())


def spectral_gain(params: CNSParams, gamma_row: Tensor, alpha: float, height: int, width: int) -> Tensor:
    """Gain β for ``rfft2`` of a height x width grid; white unit noise keeps variance 1. No energy_scale.

    >>> spectral_gain(CNSParams(), torch.zeros(32), 0.0, 8, 8).unique().tolist()
    [1.0]

    Args:
        params: give the formula, the divider and the power.
        gamma_row: [bins], holds the progress of each band in [0, 1].
        alpha: tilts the spectrum, see `alpha_tilt`.
        height, width: give the size of the unpatchified grid.

    Returns:
        float32 [height, width // 2 + 1].
    """
    index, count = radial_bands(height, width, len(gamma_row))
    return band_power(params, gamma_row.cpu(), alpha, count).sqrt().float()[index]


def color_noise(white: Tensor, gain: Tensor, patch_size: int) -> Tensor:
    """White noise filtered by ``gain`` on the unpatchified grid.

    >>> color_noise(torch.zeros(1, 128, 4, 4), torch.ones(8, 5), patch_size=2).shape
    torch.Size([1, 128, 4, 4])

    Args:
        white: [B, C, h, w], or [B, ..., h, w] where patch_size is 1, holds the noise; the last two axes are space.
        gain: [h·p, w·p // 2 + 1], weighs each mode by its radius, from `spectral_gain`, on the same device.
        patch_size: 2 for FLUX.2's packed latents, 1 for others.

    Returns:
        coloured noise of the shape and dtype of ``white``; an image's does not depend on its batch mates.
    """
    _check_channels(white, patch_size)
    height, width = white.shape[-2:]
    size = (height * patch_size, width * patch_size)
    full = torch.cat([gain, gain[:, 1 : (size[1] + 1) // 2].flip(1)], dim=1)
    full = full.unsqueeze(-1).expand(*size, 2).contiguous()  # for real and imaginary part: a plain real product
    colored = torch.empty_like(white, memory_format=torch.contiguous_format)
    for image, result in zip(white, colored, strict=True):
        source, target = (  # [C / p², h, p, w, p]: the unpatchified planes, read and written in place
            planes.reshape(-1, patch_size, patch_size, height, width).permute(0, 3, 1, 4, 2)
            for planes in (image, result)
        )
        _filter_planes(source, target, full, size)
    return colored


def _filter_planes(source: Tensor, target: Tensor, full: Tensor, size: tuple[int, int]) -> None:
    """Filter planes two at a time, as real and imaginary part: a real, even filter leaves them apart.

    Half the work of a complex FFT for each, and a few at a time, so that the working memory stays in the cache.
    """
    half = (len(source) + 1) // 2
    for start in range(0, half, PAIRS):
        real = slice(start, min(start + PAIRS, half))
        imaginary = slice(half + real.start, min(half + real.stop, len(source)))
        planes = torch.zeros(real.stop - real.start, *size, dtype=torch.complex64, device=source.device)
        parts = torch.view_as_real(planes).view(-1, *source.shape[1:], 2)
        parts[..., 0].copy_(source[real])
        parts[: imaginary.stop - imaginary.start, ..., 1].copy_(source[imaginary])
        spectrum = torch.fft.fft2(planes)
        torch.view_as_real(spectrum).mul_(full)
        parts = torch.view_as_real(torch.fft.ifft2(spectrum)).view(parts.shape)
        target[real].copy_(parts[..., 0])
        target[imaginary].copy_(parts[: imaginary.stop - imaginary.start, ..., 1])


def _check_channels(latent: Tensor, patch_size: int) -> None:
    if patch_size > 1 and (latent.ndim != 4 or latent.shape[1] % patch_size**2):
        raise ValueError(
            f"latent has shape {list(latent.shape)}; patch_size {patch_size} needs [batch, channels, height, width] "
            f"with channels a multiple of {patch_size**2}. Use patch_size 1 for latents that are not patchified."
        )
