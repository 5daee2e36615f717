"""Targets whose denoiser is exact and that are no Gaussian: what solvers and schedules are compared on.

Crops of 16x16 pixels are cut from the colour photographs that scikit-image carries. `targets` makes of them

- ``pixels``: a mixture of some 40 to 60 low-rank Gaussians, fitted to the crops as they are;
- ``latents``: the same of photographs whose power was lifted to 1/f, as that of a VAE's latents;
- ``memorised``: 1,000 crops of the first kind, each a point: a model that knows its training set by heart;
- ``field``: one Gaussian field with the power of ``latents``, that is, everything about them but their shapes.

All are scaled to mean 0 and variance 1, as FLUX.2's latents are. Each has a class, so that guidance is exact too.
`fine_ode` solves the probability-flow ODE closely enough to serve as the truth, and `deviation`, `energy_distance`
and `band_error` say how far a sampler's result is from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

SIDE = 16
SHAPE = (3, SIDE, SIDE)
SIZE = 3 * SIDE * SIDE  # D
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")
CROPS = 15_000
COMPONENTS = 80  # k-means starts from so many; about 40 to 60 have members enough
RANK = 32
MEMORISED = 1_000
KNOWN = 4  # a class is the brightest of so many equal parts of the components

Denoiser = Callable[[Tensor, Tensor | float], Tensor]  # (x [B, ...], sigma [B] or a number) -> x0 of x's shape


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of K Gaussians in D dimensions, each with r directions of its own and an isotropic rest.

    Args:
        weights: [K], summing to 1.
        means: [K, D].
        bases: [K, D, r], orthonormal columns.
        variances: [K, r] along those columns.
        rest: [K], the variance of every direction that is orthogonal to them. With r = 0 and rest 0, a point.
    """

    weights: Tensor
    means: Tensor
    bases: Tensor
    variances: Tensor
    rest: Tensor

    def __post_init__(self) -> None:
        count, size, rank = self.bases.shape
        # computed once: all columns side by side, and each mean in its own columns
        object.__setattr__(self, "_columns", self.bases.permute(1, 0, 2).reshape(size, count * rank).contiguous())
        object.__setattr__(self, "_inner", torch.einsum("kd,kdr->kr", self.means, self.bases))

    def denoised(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] where x = (1-σ)·x0 + σ·ε, exactly.

        Args:
            x: [B, ...] of D values each.
            sigma: [B] or a number, above 0, at most 1.
        """
        flat = x.reshape(len(x), -1)
        s = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
        a = 1 - s
        count, size, rank = self.bases.shape
        inner = (flat @ self._columns).view(len(x), count, rank) - a[..., None] * self._inner  # [B, K, r]
        square = flat.square().sum(1, keepdim=True) - 2 * a * (flat @ self.means.T)
        square = square + a**2 * self.means.square().sum(1)  # |x - (1-σ)·mean|², [B, K]
        inside = a[..., None] ** 2 * self.variances + s[..., None] ** 2
        outside = a**2 * self.rest + s**2
        energy = (inner.square() / inside).sum(2) + (square - inner.square().sum(2)).clamp(min=0) / outside
        volume = inside.log().sum(2) + (size - rank) * outside.log()
        share = torch.softmax(self.weights.log() - 0.5 * (energy + volume), dim=1)
        keep = a * self.rest / outside  # of x - (1-σ)·mean, in the rest
        gain = a[..., None] * self.variances / inside - keep[..., None]
        result = (share * keep).sum(1, keepdim=True) * flat + (share * (1 - a * keep)) @ self.means
        return (result + (share[..., None] * gain * inner).flatten(1) @ self._columns.T).view_as(x)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, D] exact samples."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        white = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        found = torch.empty_like(white)
        for k in index.unique().tolist():
            own, basis, rest = white[index == k], self.bases[k], self.rest[k].sqrt()
            inner = (own @ basis) * (self.variances[k].sqrt() - rest)
            found[index == k] = self.means[k] + rest * own + inner @ basis.T
        return found

    def covariance(self) -> Tensor:
        """[D, D] of the whole mixture."""
        scaled = self._columns * (self.weights[:, None] * (self.variances - self.rest[:, None])).flatten()
        centred = self.means - self.weights @ self.means
        spread = centred.T @ (centred * self.weights[:, None])
        return scaled @ self._columns.T + spread + (self.weights @ self.rest) * torch.eye(len(spread)).to(spread)

    def part(self, chosen: Tensor) -> Mixture:
        """The components at the indices ``chosen``, their weights scaled to 1."""
        weights = self.weights[chosen]
        return Mixture(
            weights / weights.sum(),
            self.means[chosen],
            self.bases[chosen],
            self.variances[chosen],
            self.rest[chosen],
        )


@dataclass(frozen=True, eq=False)
class Target:
    """What a model would have learnt: everything, and one class of it.

    ``guidance`` w makes the denoiser ``everything + w·(class - everything)``; at 1 the class alone is guided to, and
    None asks for everything. ``error`` is the relative size of the `smooth_error` in every prediction.
    """

    name: str
    everything: Mixture
    known: Mixture  # the class
    guidance: float | None = None
    error: float = 0.0

    def denoised(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """x0 [B, 3, 16, 16] predicted for x of that shape; sigma [B] or a number, above 0, at most 1."""
        if self.guidance == 1:
            x0 = self.known.denoised(x, sigma)
        else:
            x0 = self.everything.denoised(x, sigma)
            if self.guidance is not None:
                x0 = x0 + self.guidance * (self.known.denoised(x, sigma) - x0)
        return x0 + smooth_error(self.error)(x, sigma) if self.error else x0

    def guided(self, guidance: float | None) -> Target:
        return replace(self, guidance=guidance)

    def erring(self, size: float) -> Target:
        return replace(self, error=size)


def targets() -> dict[str, Target]:
    """The four targets by name, float32. The same at every call; takes about 10 s."""
    generator = torch.Generator().manual_seed(0)
    pixels = crops(photographs(), CROPS, generator)
    latents = crops([one_over_f(photograph) for photograph in photographs()], CROPS, generator)
    found = [
        mixture_target("pixels", fit_mixture(pixels, COMPONENTS, RANK, generator)),
        mixture_target("latents", fit_mixture(latents, COMPONENTS, RANK, generator)),
        mixture_target("memorised", points(pixels[torch.randperm(CROPS, generator=generator)[:MEMORISED]])),
        field_target("field", latents, generator),
    ]
    return {target.name: target for target in found}


def photographs() -> list[Tensor]:
    """The colour photographs inside scikit-image's wheel: [3, height, width] from 0 to 1."""
    from skimage import data

    found = []
    for name in PHOTOGRAPHS:
        picture = getattr(data, name)()
        picture = picture[0] if isinstance(picture, tuple) else picture  # the left one of a stereo pair
        found.append(torch.from_numpy(np.ascontiguousarray(picture)).float().permute(2, 0, 1) / 255)
    return found


def one_over_f(photograph: Tensor) -> Tensor:
    """A photograph whose power falls as 1/f² filtered so that it falls as 1/f: amplitudes times √f."""
    height, width = photograph.shape[-2:]
    mirrored = torch.cat([photograph, photograph.flip(-1)], -1)  # no edge where the FFT wraps around
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], -2)
    down, across = torch.fft.fftfreq(2 * height), torch.fft.rfftfreq(2 * width)
    radius = (down[:, None] ** 2 + across**2).sqrt()
    lifted = torch.fft.irfft2(torch.fft.rfft2(mirrored) * radius.sqrt(), s=mirrored.shape[-2:])
    return lifted[..., :height, :width]


def crops(pictures: Iterable[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """``count`` random crops, as many of each picture: [count, D], of mean 0 and variance 1 over all values."""
    pictures, found = list(pictures), []
    for picture in pictures:
        windows = picture.unfold(1, SIDE, 1).unfold(2, SIDE, 1).permute(1, 2, 0, 3, 4)  # a view
        number = count // len(pictures)
        rows = torch.randint(windows.shape[0], (number,), generator=generator)
        columns = torch.randint(windows.shape[1], (number,), generator=generator)
        found.append(windows[rows, columns].flatten(1))
    whole = torch.cat(found)
    return (whole - whole.mean()) / whole.std()


def fit_mixture(data: Tensor, components: int, rank: int, generator: torch.Generator, rounds: int = 30) -> Mixture:
    """k-means, then the leading ``rank`` principal components of every cluster; what they leave is the rest.

    A cluster with too few members for that rank is dissolved, its members go to the nearest other.
    """
    centres = data[torch.randperm(len(data), generator=generator)[:components]]

    def nearest() -> Tensor:
        return (centres.square().sum(1) - 2 * data @ centres.T).argmin(1)

    for _ in range(rounds):
        index = nearest()
        count = torch.bincount(index, minlength=len(centres))
        centres = torch.zeros_like(centres).index_add_(0, index, data) / count.clamp(min=1)[:, None]
    centres = centres[count > 2 * rank]
    index = nearest()
    parts = [data[index == k] for k in range(len(centres))]
    means, bases, variances, rest = [], [], [], []
    for members in parts:
        mean = members.mean(0)
        _, singular, basis = torch.linalg.svd(members - mean, full_matrices=False)
        power = singular.square() / len(members)
        means.append(mean)
        bases.append(basis[:rank].T)
        variances.append(power[:rank])
        rest.append(power[rank:].sum() / (data.shape[1] - rank))
    weights = torch.tensor([float(len(members)) for members in parts])
    stacked = (torch.stack(tensors) for tensors in (means, bases, variances, rest))
    return Mixture(weights / weights.sum(), *stacked)


def points(data: Tensor) -> Mixture:
    """Every row of ``data`` [K, D] as a point of the same weight; its denoiser is a softmax mean of them."""
    count, size = data.shape
    return Mixture(
        torch.full((count,), 1 / count),
        data,
        data.new_zeros(count, size, 0),
        data.new_zeros(count, 0),
        data.new_zeros(count),
    )


def mixture_target(name: str, mixture: Mixture) -> Target:
    """The class is the brightest `KNOWN`-th of the components."""
    brightest = mixture.means.mean(1).argsort(descending=True)[: len(mixture.means) // KNOWN]
    return Target(name, mixture, mixture.part(brightest))


def field_target(name: str, data: Tensor, generator: torch.Generator) -> Target:
    """A Gaussian with the mean power per frequency and channel of ``data``; its class has half, about a mean."""
    power = torch.fft.fft2(data.view(-1, *SHAPE), norm="ortho").abs().square().mean(0)
    # the real and symmetric covariance of a field that does not depend on place
    impulses = torch.eye(SIDE * SIDE).view(-1, SIDE, SIDE)
    covariance = torch.block_diag(
        *(torch.fft.ifft2(torch.fft.fft2(impulses) * channel).real.flatten(1) for channel in power)
    )
    variances, basis = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0) / variances.mean()
    one = torch.ones(1)
    everything = Mixture(one, torch.zeros(1, SIZE), basis[None], variances[None], torch.zeros(1))
    mean = basis @ (torch.randn(SIZE, generator=generator) * (variances / 2).sqrt())
    return Target(name, everything, Mixture(one, mean[None], basis[None], variances[None] / 2, torch.zeros(1)))


@lru_cache(maxsize=4)
def smooth_error(size: float, waves: int = 64) -> Denoiser:
    """A fixed smooth error of x0, as a network of that relative error in its velocity makes.

    The velocity ε - x0 has an rms of √2. So has ``2·U·sin(A·x/rms(σ) + φ + 4σ)``, with random A, U and φ and rms(σ)
    that of x. ``size`` times that is the error of the velocity, and of x0 = x - σ·v it is σ times as large.
    """
    generator = torch.Generator().manual_seed(1)
    inward = torch.randn(SIZE, waves, generator=generator) / math.sqrt(SIZE)
    outward = torch.randn(waves, SIZE, generator=generator) / math.sqrt(waves)
    phase = 2 * math.pi * torch.rand(waves, generator=generator)

    def error(x: Tensor, sigma: Tensor | float) -> Tensor:
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
        unit = x.reshape(len(x), -1) / (s**2 + (1 - s) ** 2).sqrt()
        return (2 * size * s * (torch.sin(unit @ inward.to(x) + phase.to(x) + 4 * s) @ outward.to(x))).view_as(x)

    return error


def noise(count: int, seed: int) -> Tensor:
    """[count, 3, 16, 16] unit noise, where every run starts."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def fine_ode(denoised: Denoiser, x: Tensor, steps: int = 200) -> Tensor:
    """The probability-flow ODE from σ 1 to 0, by Heun's method: 2·steps calls.

    Half of the steps are uniform in σ above .8, the others in λ = log((1-σ)/σ) down to .002, and x0 ends it.
    """
    high = torch.linspace(1, 0.8, steps // 2 + 1, dtype=torch.float64)
    low = torch.sigmoid(torch.linspace(math.log(0.8 / 0.2), math.log(0.002 / 0.998), steps - steps // 2 + 1).double())
    sigmas = torch.cat([high, low[1:]]).tolist()
    for sigma, after in pairwise(sigmas):
        slope = (x - denoised(x, sigma)) / sigma
        ahead = x + (after - sigma) * slope
        x = x + (after - sigma) / 2 * (slope + (ahead - denoised(ahead, after)) / after)
    return denoised(x, sigmas[-1])


def deviation(x: Tensor, truth: Tensor) -> float:
    """The rms of x - truth relative to the standard deviation of truth; both [B, ...] of the same noise."""
    return float((x - truth).square().mean().sqrt() / truth.std())


def whitening(mixture: Mixture) -> Tensor:
    """[D, D]: what makes the mixture's covariance 1; variances below 1e-4 count as 1e-4."""
    variances, basis = torch.linalg.eigh(mixture.covariance().double())
    return (basis / variances.clamp(min=1e-4).sqrt()).float()


def energy_distance(x: Tensor, truth: Tensor, white: Tensor) -> float:
    """1000 times the energy distance 2·E|x-y| - E|x-x'| - E|y-y'| in whitened space.

    Rows of the same index come from the same noise and are left out of E|x-y|, so that the estimate is unbiased: its
    mean is 0 for samples of one distribution, and it is 0 exactly where x is truth.

    Args:
        x, truth: [B, ...] of D values each.
        white: [D, D] from `whitening`.
    """
    x, truth = (part.flatten(1) @ white for part in (x, truth))
    count = len(x)

    def mean_distance(left: Tensor, right: Tensor) -> float:
        distance = torch.cdist(left, right, compute_mode="use_mm_for_euclid_dist").double()
        return float(distance.sum() - distance.diagonal().sum()) / (count * (count - 1))

    return 1000 * (2 * mean_distance(x, truth) - mean_distance(x, x) - mean_distance(truth, truth))


def band_error(x: Tensor, truth: Tensor) -> float:
    """Σ(√V-√P)² / ΣP over the modes, V and P the power of x and of truth in bands of frequency.

    (√V-√P)² is taken as the product of that error in two halves of the samples: its mean holds no sampling noise, which
    a sampler that draws noise of its own would bring; so it can fall below 0 by chance.

    Args:
        x, truth: [B, 3, 16, 16].
    """
    across = torch.fft.fftfreq(SIDE) * SIDE
    band = (across[:, None] ** 2 + across**2).sqrt().round().long().flatten()
    modes = torch.bincount(band).double()

    def power(samples: Tensor) -> Tensor:
        per_mode = torch.fft.fft2(samples, norm="ortho").abs().square().double().mean((0, 1)).flatten()
        return torch.zeros(len(modes), dtype=torch.float64).index_add_(0, band, per_mode) / modes

    first, second = (power(a).sqrt() - power(b).sqrt() for a, b in zip(x.chunk(2), truth.chunk(2), strict=True))
    return float((modes * first * second).sum() / (modes * power(truth)).sum())
