"""Colored Noise Sampling (arXiv:2605.30332): parameters, progress, colour, solvers and the sampling loop.

The diffusers scheduler is in `sampler.scheduler`, apart, so that importing this imports no diffusers.
"""

from .measure import band_spectrum, half_octave_spectrum
from .noise_sampler import ColoredNoiseSampler
from .params import CNSParams
from .progress import ProgressMatrix, reference_progress, shipped_progress
from .sampling import CNSRun, sample_cns
from .spectrum import alpha_tilt, color_noise, patchify, spectral_gain, unpatchify

__all__ = [
    "CNSParams",
    "CNSRun",
    "ColoredNoiseSampler",
    "ProgressMatrix",
    "alpha_tilt",
    "band_spectrum",
    "color_noise",
    "half_octave_spectrum",
    "patchify",
    "reference_progress",
    "sample_cns",
    "shipped_progress",
    "spectral_gain",
    "unpatchify",
]
