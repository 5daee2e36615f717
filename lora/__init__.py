"""LoRA files for klein: which to load, and loading them."""

from .stack import MAX_LORAS, LoraSpec, parse_loras

__all__ = ["MAX_LORAS", "LoraSpec", "parse_loras"]
