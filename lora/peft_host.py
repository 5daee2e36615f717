"""LoRAs on the diffusers host: loaded as peft adapters, and checked to have applied whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stack import LoraSpec

UP_SUFFIXES = ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_B.default.weight")


def set_loras(pipe: Any, specs: Sequence[LoraSpec]) -> None:
    """Replace the LoRAs of a ``Flux2KleinPipeline`` by these.

    Raises:
        ValueError: a file that cannot be read, holds NaN, or would apply only in part; no LoRA stays loaded then.
    """
    pipe.unload_lora_weights()
    names = [f"lora_{i}" for i in range(len(specs))]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is asked for
            for name, spec in zip(names, specs, strict=True):
                _load(pipe, name, spec)
        if specs:
            pipe.set_adapters(names, [spec.scale for spec in specs])
    except BaseException:
        pipe.unload_lora_weights()
        raise


def _load(pipe: Any, name: str, spec: LoraSpec) -> None:
    """Load one file; diffusers only logs what it skips, so count what arrived.

    Every element of the up matrices must arrive: splitting a fused q, k, v keeps their number.
    """
    state = _read(spec.path)
    expected = sum(tensor.numel() for key, tensor in state.items() if key.endswith(UP_SUFFIXES))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values() if tensor.is_floating_point()):
        raise ValueError(f"LoRA {Path(spec.path).name} holds NaN or infinite values; train or download it again.")
    problem = None
    try:
        pipe.load_lora_weights(dict(state), adapter_name=name)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        problem = error
    ups = [value for key, value in pipe.transformer.state_dict().items() if key.endswith(f"lora_B.{name}.weight")]
    applied = sum(value.numel() for value in ups)
    if problem or applied == 0 or applied != expected:
        share = f"{applied / expected:.0%} of it fits this model" if expected else "it holds no LoRA matrices"
        reason = f" ({str(problem).splitlines()[0]})" if problem and str(problem) else ""
        raise ValueError(
            f"LoRA {Path(spec.path).name} cannot be applied whole: {share}{reason}. Needed are lora_A and lora_B "
            "matrices for FLUX.2 [klein] 9B named as diffusers or BFL name them."
        )


def _read(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"LoRA {Path(path).name} cannot be read ({error}); download it again.") from error
