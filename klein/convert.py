"""FLUX.2 transformer weights between the layout of diffusers and that of Black Forest Labs (which ComfyUI reads)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..weights.layout import ADA_LAYER_NORM, BLOCKS, Row, names_in, rows, swap_halves


def diffusers_to_bfl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ``Flux2Transformer2DModel`` in BFL's layout::

        bfl = diffusers_to_bfl(pipe.transformer.state_dict())

    Args:
        state: holds unquantised weights of any dtype, on any device. Tensors that need no change are not copied.

    Raises:
        ValueError: keys are missing or unknown, quantisation scales among them.
    """
    table = _rows_of(state, "diffusers")
    _check_keys(state, names_in(table, "diffusers"), "diffusers")
    return {row.bfl: _to_bfl(row, [state[name] for name in row.diffusers]) for row in table}


def bfl_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in BFL's layout as a ``Flux2Transformer2DModel`` takes them; the inverse of `diffusers_to_bfl`::

        transformer.load_state_dict(bfl_to_diffusers(load_file("klein.safetensors")))

    Args:
        state: holds unquantised weights of any dtype, on any device, without a prefix. Nothing but the final norm is
            copied: q, k and v are views of one tensor.

    Raises:
        ValueError: keys are missing or unknown, quantisation scales among them, or rows do not divide into q, k and v.
    """
    table = _rows_of(state, "bfl")
    _check_keys(state, names_in(table, "bfl"), "BFL")
    return {
        name: part
        for row in table
        for name, part in zip(row.diffusers, _to_diffusers(row, state[row.bfl]), strict=True)
    }


def _count_blocks(names: Iterable[str], block: str) -> int:
    pattern = re.compile(re.escape(block) + r"\.(\d{1,3})\.")
    matches = filter(None, map(pattern.match, names))
    return max((int(match[1]) + 1 for match in matches), default=0)


def _rows_of(names: Collection[str], layout: str) -> list[Row]:
    is_bfl = layout == "bfl"
    doubles, singles = (_count_blocks(names, bfl if is_bfl else diffusers) for bfl, diffusers, _ in BLOCKS)
    guidance = "guidance_in." if is_bfl else "time_guidance_embed.guidance_embedder."
    return rows(doubles, singles, any(name.startswith(guidance) for name in names))


def _check_keys(found: Collection[str], needed: list[str], layout: str) -> None:
    missing = [name for name in needed if name not in found]
    unknown = sorted(set(found) - set(needed))
    problems = [f"{word} {_listed(names)}" for word, names in (("missing", missing), ("unknown", unknown)) if names]
    if problems:
        raise ValueError(f"no weights of a FLUX.2 transformer in {layout} layout: {'; '.join(problems)}.")


def _listed(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _to_bfl(row: Row, parts: list[Tensor]) -> Tensor:
    if row.bfl == ADA_LAYER_NORM:
        return swap_halves(parts[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _to_diffusers(row: Row, tensor: Tensor) -> list[Tensor]:
    if row.bfl == ADA_LAYER_NORM:
        return [swap_halves(tensor)]
    count = len(row.diffusers)
    if len(tensor) % count:
        raise ValueError(f"{row.bfl} has {len(tensor)} rows, which do not divide into {count} equal parts.")
    return list(tensor.chunk(count))
