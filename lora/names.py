"""What a key of a LoRA file says: a module of FLUX.2, and the role that a tensor has in its change.

A key is the name of a module, then a role as the trainer spells it. Each trainer has its own way:

- kohya's sd-scripts and musubi-tuner join BFL's names with underscores:
  ``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight``, ``lora_unet_single_blocks_0_linear1.alpha``
- ai-toolkit takes BFL's names as they are: ``diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight``; a DoRA has
  ``diffusion_model.single_blocks.0.linear2.magnitude`` too, a LoKr ``diffusion_model.single_blocks.0.linear1.lokr_w1``
- fal's trainers write ``base_model.model.double_blocks.0.txt_attn.proj.lora_B.weight``
- peft and diffusers know diffusers' names: ``base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight`` beside an
  adapter_config.json, ``transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_B.weight`` with the same in
  the metadata; a DoRA has ``transformer.proj_out.lora_magnitude_vector`` too
- OneTrainer: ``transformer.transformer_blocks.0.attn.add_k_proj.lora_up.weight``; in older versions
  ``lora_transformer_transformer_blocks_0_ff_linear_in.dora_scale``; in backups
  ``transformer.transformer_blocks.0.attn.qkv.alpha``
- SimpleTuner: ``transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight``; where q, k and v are fused
  ``transformer.transformer_blocks.0.attn.to_added_qkv.lora_A.weight``
- LyCORIS, also inside SimpleTuner: ``lycoris_transformer_blocks_0_attn_to_qkv.lokr_w2_a``,
  ``lycoris_context_embedder.hada_w1_b``, ``lycoris_norm_out_linear.diff``
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from ..weights.layout import rows

MAX_KEY = 512  # characters; no key of a LoRA is longer
MAX_BLOCKS = 64  # of either kind, in any FLUX
# What holds q, k and v as one inside diffusers' blocks, as BFL's modules do: fuse_qkv_projections() of diffusers makes
# the first two, OneTrainer's backups name them as the others.
FUSED = {
    "attn.to_qkv": "img_attn.qkv",
    "attn.to_added_qkv": "txt_attn.qkv",
    "attn.qkv": "img_attn.qkv",
    "attn.added_qkv": "txt_attn.qkv",
}
UP_BIAS = "lora_bias"  # role of peft's lora_B.bias, which is part of the change
BIAS = "diff_b"  # role of every other bias
# sd-scripts numbers the parts of a factor, lora_down.0.weight, where it trains q, k and v of one module apart.
SPLIT_SPELLINGS = ("lora_down", "lora_up")
NO_BIAS = "klein has no biases"
TUCKER = "Tucker factors belong to convolutions, klein has none"
OTHER_KINDS = {  # of adapter than LoRA, by what follows a module's name in their keys
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_r", "oft_R"), "OFT is not supported"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT is not supported"),
    **dict.fromkeys(("on_input", "ia3_l"), "IA3 is not supported"),
    **dict.fromkeys(("a1", "a2", "b1", "b2"), "GLoRA is not supported"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"), "VeRA is not supported"),
    **dict.fromkeys(
        ("q_layer", "p_layer", "lambda_layer", "base_q", "base_p", "base_lambda"), "T-LoRA is not supported"
    ),
    **dict.fromkeys(("lora_a", "lora_b"), "LoRA of MLX is not supported, convert it to peft's names"),
}
UNSUPPORTED = {  # roles that no form takes, each with the reason
    **OTHER_KINDS,
    **dict.fromkeys((BIAS, "b_norm"), NO_BIAS),
    **dict.fromkeys(("lora_mid", "lokr_t2", "hada_t1", "hada_t2"), TUCKER),
    **dict.fromkeys(("set_weight", "modules_to_save"), "it replaces the weight, which no strength can scale"),
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B"), "klein has no embedding tables"),
}
TEXT_ENCODER = re.compile(
    r"(?:^|[._])(?:text_encoders?|text_model|lora_te\d?|te\d?|clip_[lg]|cond_stage_model|qwen\w*)(?:[._]|$)"
    r"|layers[._]\d+[._](?:self_attn|mlp)[._]"
)
FLUX_1 = re.compile(
    r"double_blocks[._]\d+[._](?:img|txt)_mod[._]|single_blocks[._]\d+[._]modulation[._]|vector_in[._]"
    r"|transformer_blocks[._]\d+[._](?:norm1|norm1_context|ff[._]net|ff_context[._]net)[._]"
    r"|single_transformer_blocks[._]\d+[._](?:attn[._]to_(?:[qkv]|qkv)$|proj_mlp|proj_out|norm[._]linear)"
    r"|time_text_embed[._]"
)
# What stands before a module of the same name in another model: its block, or the model.
FOREIGN = re.compile(rf"{TEXT_ENCODER.pattern}|(?:^|[._])(?:single|\d+|controlnet\w*|vae)[._]")


class Key(NamedTuple):
    """A key taken apart.

    Attributes:
        module: names the module as the file does.
        role: says what the tensor is in the module's change; one of a form's, of `UNSUPPORTED`, or `UP_BIAS`.
        adapter: names the adapter, which peft keeps in some files; None where the key has no such name.
        split: counts the parts of a factor that is stored in several; None where it is stored whole.
    """

    module: str
    role: str
    adapter: str | None = None
    split: int | None = None


class Module(NamedTuple):
    """A module of FLUX.2, found by one of its names.

    Attributes:
        weight: names its weight as BFL does.
        part, parts: count the equal row slices of that weight; parts is 3 for q, k and v apart, else 1.
        layout: ``bfl`` or ``diffusers``, whichever names it so.
        name: is its full name in that layout.
        prefix: stood before that name in the file.
    """

    weight: str
    part: int
    parts: int
    layout: str
    name: str
    prefix: str = ""


def parse(key: str, roles: Mapping[str, str]) -> Key | None:
    """Take a key apart; None where it does not belong to a known kind of LoRA.

    >>> parse("unet.proj_out.lora_A.weight", {"lora_A": "down"})
    Key(module='unet.proj_out', role='down', adapter=None, split=None)

    Args:
        key: a tensor's name in a file.
        roles: give the role of each spelling, as `forms.roles` lists them.
    """
    for module, spelling, adapter, kind in _readings(key):
        role = roles.get(spelling) or (spelling if spelling in UNSUPPORTED else None)
        if role is None:
            continue
        if kind == "bias":
            role = UP_BIAS if role == "up" else BIAS
        elif spelling in SPLIT_SPELLINGS and adapter and adapter.isdecimal():
            return Key(module, role, split=int(adapter))
        return Key(module, role, adapter)
    return None


def _readings(key: str) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Every way to read a key as a module, a spelling of one or two words, an adapter's name or none, and ``weight``,
    ``bias`` or neither; the longest module first."""
    words = key.split(".") if len(key) <= MAX_KEY and "\n" not in key else []
    for start in range(len(words) - 1, max(len(words) - 5, 0), -1):  # at most four words follow the module
        module = ".".join(words[:start])
        for count in (1, 2):
            spelling, rest = ".".join(words[start : start + count]), words[start + count :]
            kind = rest.pop() if rest and rest[-1] in ("weight", "bias") else None
            if module and len(rest) <= 1 and all(rest):
                yield module, spelling, rest[0] if rest else None, kind


def locate(name: str) -> Module | None:
    """Find a module by its name with any prefix; None where FLUX.2 has no such module.

    >>> locate("lora_unet_single_blocks_3_linear2").weight
    'single_blocks.3.linear2.weight'

    The longest tail that names a module counts. It begins after a dot or an underscore; a name with dots but without a
    block splits at dots only, since its last words may belong to one name.
    """
    flat, joints = name.replace(".", "_"), "." if "." in name and "blocks" not in name else "._"
    starts = (0, *(i + 1 for i, letter in enumerate(name) if letter in joints))
    start = next((i for i in starts if flat[i:] in _modules()), None)
    if start is None or (start and (FOREIGN.search(name[:start]) or FLUX_1.search(name))):
        return None
    return _modules()[flat[start:]]._replace(prefix=name[:start])


@cache
def _modules() -> dict[str, Module]:
    """Every module of either layout, by its name with underscores in place of dots."""
    modules: list[Module] = []
    for row in rows(MAX_BLOCKS, MAX_BLOCKS, guidance=True):
        modules.append(Module(row.bfl, 0, 1, "bfl", row.bfl.rpartition(".")[0]))
        for part, name in enumerate(row.diffusers):
            modules.append(Module(row.bfl, part, len(row.diffusers), "diffusers", name.rpartition(".")[0]))
    for block in range(MAX_BLOCKS):
        for fused, bfl in FUSED.items():
            name = f"transformer_blocks.{block}.{fused}"
            modules.append(Module(f"double_blocks.{block}.{bfl}.weight", 0, 1, "diffusers", name))
    return {module.name.replace(".", "_"): module for module in modules}
