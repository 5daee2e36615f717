"""FLUX.2 [klein]: architecture facts, sizes, schedules, references, prompts, and the diffusers pipeline."""

from ..endpoint import IMAGE_SIZES
from .pipeline import KleinPipeline
from .presets import PRESETS, preset
from .request import KleinRequest
from .result import KleinResult
from .schedules import SCHEDULES, empirical_mu, flux2_sigmas, log_snr_sigmas
from .tiny import tiny

__all__ = [
    "IMAGE_SIZES",
    "PRESETS",
    "SCHEDULES",
    "KleinPipeline",
    "KleinRequest",
    "KleinResult",
    "empirical_mu",
    "flux2_sigmas",
    "log_snr_sigmas",
    "preset",
    "tiny",
]
