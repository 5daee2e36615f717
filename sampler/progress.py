"""Progress γ(f, t) in [0, 1]: how far frequency band f is resolved at flow time t = 1 - sigma."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from .gamma_fits import BINS, FITS, UNGUIDED, fitted_gamma
from .measure import band_spectrum
from .params import CNSParams


@dataclass(frozen=True, eq=False)
class ProgressMatrix:
    """γ on a grid of flow times and radial bands.

    >>> ProgressMatrix(torch.eye(2), torch.tensor([0.0, 1.0])).at(0.25, 2)
    tensor([0.7500, 0.2500])

    Args:
        values: [rows, bins], hold γ in [0, 1]; column k belongs to the normalised radius k / (bins - 1).
        t: [rows], rises within 0 to 1 and gives the flow time of each row.
        name: names the matrix in a report.

    Raises:
        ValueError: the shapes do not fit, a value is not finite or out of range, or t does not rise.
    """

    values: Tensor
    t: Tensor
    name: str = ""  # what to call it in a report

    def __post_init__(self) -> None:
        values, t = (
            part if part.is_floating_point() else part.float()
            for part in (torch.as_tensor(self.values, device="cpu"), torch.as_tensor(self.t, device="cpu"))
        )
        if values.ndim != 2 or t.ndim != 1 or len(values) != len(t) or values.shape[1] < 2 or len(t) < 2:
            raise ValueError(
                f"progress values have shape {list(values.shape)} and t {list(t.shape)}; needed are "
                "[rows, bins] and [rows] with at least 2 rows and 2 bins."
            )
        if not (values.isfinite().all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                "progress values must be finite and from 0 to 1; scale each band to [0, 1] as the authors' "
                f"notebook does. Found {float(values.min()):.4g} to {float(values.max()):.4g}."
            )
        if not (t.isfinite().all() and t.min() >= 0 and t.max() <= 1 and bool((t.diff() > 0).all())):
            raise ValueError(
                f"progress t must rise within 0 to 1, flow time of each row; found {float(t[0]):.4g} to "
                f"{float(t[-1]):.4g}."
            )
        object.__setattr__(self, "values", values.detach())
        object.__setattr__(self, "t", t.detach())

    def at(self, t: float, num_bins: int) -> Tensor:
        """γ of every band at flow time t: linear between rows, bands resampled by normalised radius.

        Args:
            t: flow time; before the first row it takes that row, and after the last row that one.
            num_bins: counts the bands to return.

        Returns:
            [num_bins] in the dtype of ``values``.

        Raises:
            ValueError: t is NaN.
        """
        rows, t = self.t.double().numpy(), float(t)
        if np.isnan(t):
            raise ValueError("the flow time t is NaN; it must be a number from 0 to 1.")
        after = int(np.clip(np.searchsorted(rows, t), 1, len(rows) - 1))
        weight = float(np.clip((t - rows[after - 1]) / (rows[after] - rows[after - 1]), 0.0, 1.0))
        low, high = self.values[after - 1].double().numpy(), self.values[after].double().numpy()
        row = (1.0 - weight) * low + weight * high
        if num_bins != len(row):
            row = np.interp(np.linspace(0, 1, num_bins), np.linspace(0, 1, len(row)), row)
        return torch.from_numpy(row).to(self.values.dtype)

    def save(self, path: str | Path) -> None:
        """Write ``gamma`` [rows, bins] and ``t`` [rows] as a .safetensors file that `load` reads::

        matrix.save("measured.safetensors")
        """
        from safetensors.torch import save_file

        save_file({"gamma": self.values.contiguous(), "t": self.t.contiguous()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> ProgressMatrix:
        """Read a .safetensors with ``gamma`` (and ``t``), or a .pt that holds one [rows, bins] tensor::

            matrix = ProgressMatrix.load("measured.safetensors")

        Without ``t`` the rows are taken as uniform in flow time from 0 to 1, as the authors measure them.
        A .pt is opened with ``weights_only=True``: nothing in it is run.

        Raises:
            ValueError: the file is missing or unreadable, or holds no such matrix; the message names it.
        """
        path = Path(path)
        try:
            tensors = _read_tensors(path)
            gamma = tensors["gamma"].float() if tensors["gamma"].dtype != torch.float64 else tensors["gamma"]
            t = tensors.get("t", torch.linspace(0, 1, len(gamma), device="cpu"))
            return cls(gamma, t, path.name)
        except (OSError, EOFError, KeyError, ValueError, RuntimeError, TypeError, _safetensors_error()) as error:
            reason = "it holds no tensor named 'gamma'" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(
                f"progress file {path.name} cannot be used: {reason}. Needed is a .safetensors with 'gamma' [rows, "
                "bins] and 't' [rows], or a .pt with one [rows, bins] tensor."
            ) from error


@lru_cache(maxsize=4)
def shipped_progress(name: str = UNGUIDED) -> ProgressMatrix:
    """A fitted model of one of the authors' two published matrices (`gamma_fits`).

    >>> shipped_progress().at(0.5, 32).shape
    torch.Size([32])

    Raises:
        ValueError: the name is not in ``gamma_fits.FITS``.
    """
    if name not in FITS:
        raise ValueError(f"progress {name!r} is not shipped; shipped are {', '.join(FITS)}.")
    t = torch.linspace(0, 1, 250, dtype=torch.float64, device="cpu")
    return ProgressMatrix(torch.from_numpy(fitted_gamma(t.numpy(), FITS[name])), t, name)


def find_progress(name: str) -> ProgressMatrix:
    """The matrix that ``cns_gamma_file`` names: a shipped one, or a file.

    Raises:
        ValueError: neither, or a file that holds no matrix.
    """
    return shipped_progress(name) if name in FITS else ProgressMatrix.load(name)


def approximation() -> ProgressMatrix:
    """γ = t for every band.

    >>> approximation().at(0.25, 2).tolist()
    [0.25, 0.25]
    """
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    return ProgressMatrix(t[:, None].expand(2, 2), t)


def reference_progress(latents: Tensor | Sequence[Tensor], patch_size: int, num_bins: int = BINS) -> ProgressMatrix:
    """γ from the pictures being edited: that of a Gaussian field with their power spectrum.

    With P(f) the orthonormal FFT power per band (white unit noise = 1), averaged over channels and
    references, and ``W = t²P / (t²P + σ²)``: ``γ = 2√W - W``. On the exact ODE of such a field this is
    the authors' measure, 1 - |x̂0 - x_final|² / |x_final|² (``FrequencyAnalyzer`` in their code).

    >>> reference_progress(torch.ones(1, 128, 4, 4), 2, num_bins=8).values.shape
    torch.Size([1025, 8])

    Args:
        latents: hold the reference pictures, one tensor [B, C, h, w] or several of any sizes.
        patch_size: 2 unpacks FLUX.2's latents; 1 leaves latents as they are.
        num_bins: counts the bands to measure; a band that no latent has a mode in is interpolated.

    Raises:
        ValueError: there is no latent, or one holds NaN or infinite values.
    """
    return field_progress(reference_power(latents, patch_size, num_bins))


def reference_power(latents: Tensor | Sequence[Tensor], patch_size: int, num_bins: int = BINS) -> Tensor:
    """Power per band of latents, where white unit noise has 1, averaged over channels and latents.

    >>> reference_power(torch.zeros(1, 128, 4, 4), 2, num_bins=8).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]

    Args, Raises: as `reference_progress`.

    Returns:
        float64 [num_bins].
    """
    latents = [latents] if isinstance(latents, Tensor) else list(latents)
    if not latents:
        raise ValueError("reference progress needs at least one reference latent; none was given.")
    if not all(latent.isfinite().all() for latent in latents):
        raise ValueError("a reference latent holds NaN or infinite values; encode the picture again.")
    measures = [band_spectrum(latent, patch_size, num_bins).numpy() for latent in latents]
    spectra = np.ma.masked_invalid(measures).mean(axis=0)
    bands, measured = np.arange(num_bins), ~np.ma.getmaskarray(spectra)
    return torch.from_numpy(np.interp(bands, bands[measured], spectra[measured]))


def field_progress(power: Tensor) -> ProgressMatrix:
    """γ of a Gaussian field, see `reference_progress`.

    Args:
        power: float64 [bins], the field's power per band, where white unit noise has 1.

    Raises:
        ValueError: a power is negative or not finite.
    """
    if not (power.isfinite().all() and power.min() >= 0):
        raise ValueError(
            f"the power of a band must be finite and not negative; found {float(power.min()):.4g} to "
            f"{float(power.max()):.4g}."
        )
    # rows even in log-SNR follow the steep rise of strong bands near t = 0
    t = torch.sigmoid(torch.linspace(-14, 14, 1023, dtype=torch.float64, device="cpu"))
    t = torch.cat([t.new_zeros(1), t, t.new_ones(1)])
    signal = t[:, None] ** 2 * power
    wiener = torch.where(power > 0, signal / (signal + (1 - t[:, None]) ** 2).clamp(min=1e-300), 0.0)
    return ProgressMatrix((2 * wiener.sqrt() - wiener).clamp(0, 1), t)


def resolve_progress(params: CNSParams, progress: ProgressMatrix | None) -> ProgressMatrix:
    """The progress that ``params.gamma_source`` asks for.

    >>> resolve_progress(CNSParams(), None).name
    'sit_xl2_unguided'

    Args:
        params: name the source.
        progress: γ to use; None takes the shipped unguided matrix, or γ = t under ``approximation``.

    Raises:
        ValueError: the source is ``reference`` and no progress is given, or ``approximation`` and one is given.
    """
    if params.gamma_source == "approximation":
        if progress is not None:
            raise ValueError(
                "cns_gamma_source is 'approximation', which takes gamma = t, yet a progress matrix was given; "
                "leave the matrix out or choose 'matrix'."
            )
        return approximation()
    if progress is not None:
        return progress
    if params.gamma_source == "reference":
        raise ValueError(
            "cns_gamma_source is 'reference', which needs at least one reference picture, and there is none; "
            "connect a picture or choose 'matrix'."
        )
    return shipped_progress()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError("it is not a file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    if path.suffix == ".pt":
        if not zipfile.is_zipfile(path):
            raise ValueError("it is cut off, or not a file that torch.save wrote")
        try:
            gamma = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise ValueError("it is a pickle of something other than tensors, which is never opened.") from error
        if not isinstance(gamma, Tensor):
            raise ValueError(f"it holds a {type(gamma).__name__}, not a tensor.")
        return {"gamma": gamma}
    raise ValueError(f"its ending is {path.suffix or 'missing'}.")


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
