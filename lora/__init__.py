"""LoRA files for klein: which to load, what they are, and the updates of the model's weights that they mean."""

from .canonical import Lora
from .errors import LoraError
from .load import examine_lora, load_lora, load_loras
from .report import Report
from .stack import MAX_LORAS, LoraSpec, parse_loras
from .updates import Full, LoHa, LoKr, LowRank, Update

__all__ = [
    "MAX_LORAS",
    "Full",
    "LoHa",
    "LoKr",
    "Lora",
    "LoraError",
    "LoraSpec",
    "LowRank",
    "Report",
    "Update",
    "examine_lora",
    "load_lora",
    "load_loras",
    "parse_loras",
]
