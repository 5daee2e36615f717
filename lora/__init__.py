"""LoRA files for klein: which to load, what they are, and the updates of the model's weights that they mean.

The way of a file: `read` reads it (`LoraFile`). `names` takes its keys apart (`Key`) and finds the modules of FLUX.2
that they name (`Module`). `forms` makes of each module's factors (`Factors`) a form of change (`Form`), and of that an
`Update` of one weight. `canonical` puts the updates together with a `Report` (`Lora`), `load` keeps them for the hosts,
and `peft_host` puts them on a diffusers pipeline. `config` reads peft's config.
"""

from .canonical import Lora
from .forms import Form, Full, LoHa, LoKr, LowRank, Update
from .load import MAX_LORAS, LoraSpec, examine_lora, load_lora, load_loras, parse_loras
from .report import LoraError, Report

__all__ = [
    "MAX_LORAS",
    "Form",
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
