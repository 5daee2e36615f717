"""FLUX.2 transformer weights between the layout of diffusers and that of Black Forest Labs (which ComfyUI reads)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ADA_LAYER_NORM = "final_layer.adaLN_modulation.1.weight"  # BFL: shift above scale; diffusers: scale above shift


class Row(NamedTuple):
    """One tensor in BFL layout, and the one, or the three stacked in it, that it is in diffusers layout."""

    bfl: str
    diffusers: tuple[str, ...]


ONCE = (
    Row("img_in.weight", ("x_embedder.weight",)),
    Row("txt_in.weight", ("context_embedder.weight",)),
    Row("time_in.in_layer.weight", ("time_guidance_embed.timestep_embedder.linear_1.weight",)),
    Row("time_in.out_layer.weight", ("time_guidance_embed.timestep_embedder.linear_2.weight",)),
    Row("double_stream_modulation_img.lin.weight", ("double_stream_modulation_img.linear.weight",)),
    Row("double_stream_modulation_txt.lin.weight", ("double_stream_modulation_txt.linear.weight",)),
    Row("single_stream_modulation.lin.weight", ("single_stream_modulation.linear.weight",)),
    Row(ADA_LAYER_NORM, ("norm_out.linear.weight",)),
    Row("final_layer.linear.weight", ("proj_out.weight",)),
)
GUIDANCE = (  # FLUX.2 [dev] alone
    Row("guidance_in.in_layer.weight", ("time_guidance_embed.guidance_embedder.linear_1.weight",)),
    Row("guidance_in.out_layer.weight", ("time_guidance_embed.guidance_embedder.linear_2.weight",)),
)
DOUBLE = (
    Row("img_attn.qkv.weight", ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")),
    Row("img_attn.norm.query_norm.scale", ("attn.norm_q.weight",)),
    Row("img_attn.norm.key_norm.scale", ("attn.norm_k.weight",)),
    Row("img_attn.proj.weight", ("attn.to_out.0.weight",)),
    Row("img_mlp.0.weight", ("ff.linear_in.weight",)),
    Row("img_mlp.2.weight", ("ff.linear_out.weight",)),
    Row("txt_attn.qkv.weight", ("attn.add_q_proj.weight", "attn.add_k_proj.weight", "attn.add_v_proj.weight")),
    Row("txt_attn.norm.query_norm.scale", ("attn.norm_added_q.weight",)),
    Row("txt_attn.norm.key_norm.scale", ("attn.norm_added_k.weight",)),
    Row("txt_attn.proj.weight", ("attn.to_add_out.weight",)),
    Row("txt_mlp.0.weight", ("ff_context.linear_in.weight",)),
    Row("txt_mlp.2.weight", ("ff_context.linear_out.weight",)),
)
SINGLE = (
    Row("linear1.weight", ("attn.to_qkv_mlp_proj.weight",)),
    Row("linear2.weight", ("attn.to_out.weight",)),
    Row("norm.query_norm.scale", ("attn.norm_q.weight",)),
    Row("norm.key_norm.scale", ("attn.norm_k.weight",)),
)
BLOCKS = (("double_blocks", "transformer_blocks", DOUBLE), ("single_blocks", "single_transformer_blocks", SINGLE))


def diffusers_to_bfl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BFL's weights of those of a ``Flux2Transformer2DModel``.

    Args:
        state: unquantised weights of any dtype, on any device. Tensors that need no change are not copied.

    Raises:
        ValueError: keys that are missing or unknown, quantisation scales among them.
    """
    table = _rows_of(state, "diffusers")
    _check_keys(state, names_in(table, "diffusers"), "diffusers")
    return {row.bfl: _to_bfl(row, [state[name] for name in row.diffusers]) for row in table}


def bfl_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ``Flux2Transformer2DModel`` of those in BFL layout; the inverse of `diffusers_to_bfl`.

    Args:
        state: unquantised weights of any dtype, on any device, without a prefix. Nothing but the final norm is
            copied: q, k and v are views of one tensor.

    Raises:
        ValueError: keys that are missing or unknown, quantisation scales among them; rows that do not
            divide into q, k and v.
    """
    table = _rows_of(state, "bfl")
    _check_keys(state, names_in(table, "bfl"), "BFL")
    return {
        name: part
        for row in table
        for name, part in zip(row.diffusers, _to_diffusers(row, state[row.bfl]), strict=True)
    }


def rows(double_blocks: int, single_blocks: int, guidance: bool = False) -> list[Row]:
    """The rows of a whole transformer with so many blocks."""
    listed = [*ONCE, *(GUIDANCE if guidance else ())]
    for (bfl, diffusers, block), count in zip(BLOCKS, (double_blocks, single_blocks), strict=True):
        for i in range(count):
            listed += [Row(f"{bfl}.{i}.{a}", tuple(f"{diffusers}.{i}.{name}" for name in b)) for a, b in block]
    return listed


def names_in(table: Iterable[Row], layout: str) -> list[str]:
    """The tensors of these rows as ``layout`` (bfl or diffusers) names them."""
    return [name for row in table for name in ((row.bfl,) if layout == "bfl" else row.diffusers)]


def _count_blocks(names: Iterable[str], block: str) -> int:
    pattern = re.compile(re.escape(block) + r"\.(\d{1,3})\.")
    return max((int(found[1]) + 1 for name in names if (found := pattern.match(name))), default=0)


def _rows_of(names: Collection[str], layout: str) -> list[Row]:
    column = 0 if layout == "bfl" else 1
    doubles, singles = (_count_blocks(names, block[column]) for block in BLOCKS)
    guidance = ("guidance_in.", "time_guidance_embed.guidance_embedder.")[column]
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
        return _swap_halves(parts[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _to_diffusers(row: Row, tensor: Tensor) -> list[Tensor]:
    if row.bfl == ADA_LAYER_NORM:
        return [_swap_halves(tensor)]
    count = len(row.diffusers)
    if len(tensor) % count:
        raise ValueError(f"{row.bfl} has {len(tensor)} rows, which do not divide into {count} equal parts.")
    return list(tensor.chunk(count))


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])
