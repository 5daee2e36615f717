"""What the tensors of a FLUX.2 transformer are called in the layouts of diffusers and of Black Forest Labs, and how the
one is made of the other."""

from __future__ import annotations

from collections.abc import Iterable
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


def rows(double_blocks: int, single_blocks: int, guidance: bool = False) -> list[Row]:
    """The rows of a whole transformer with so many blocks of each kind.

    >>> len(rows(8, 24))
    201

    Args:
        double_blocks, single_blocks: count the blocks of each kind.
        guidance: adds the guidance embedding of FLUX.2 [dev].
    """
    listed = [*ONCE, *(GUIDANCE if guidance else ())]
    for (bfl, diffusers, block), count in zip(BLOCKS, (double_blocks, single_blocks), strict=True):
        for i in range(count):
            listed += [Row(f"{bfl}.{i}.{a}", tuple(f"{diffusers}.{i}.{name}" for name in b)) for a, b in block]
    return listed


def names_in(table: Iterable[Row], layout: str) -> list[str]:
    """The tensors of these rows as ``layout`` (bfl or diffusers) names them.

    >>> names_in(rows(0, 0), "diffusers")[0]
    'x_embedder.weight'
    """
    return [name for row in table for name in ((row.bfl,) if layout == "bfl" else row.diffusers)]


def swap_halves(tensor: Tensor) -> Tensor:
    """The second half of the rows above the first.

    >>> swap_halves(torch.tensor([1, 2, 3, 4])).tolist()
    [3, 4, 1, 2]
    """
    return torch.cat(tensor.chunk(2)[::-1])
