"""What a key of a LoRA file means: which module of FLUX.2 it belongs to, and what part of an update it is."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from ..weights.layout import rows

MAX_KEY = 512  # characters; no key of a LoRA is longer
MAX_BLOCKS = 64  # of either kind, in any FLUX
ROLES = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_linear_layer.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up", "lora_linear_layer.up": "up",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "magnitude": "magnitude",
    "w_norm": "diff",
    **{name: name for name in ("alpha", "scalar", "diff", "reshape_weight")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
}  # fmt: skip
# What holds q, k and v as one inside diffusers' blocks, as BFL's modules do: fuse_qkv_projections() of diffusers makes
# the first two, OneTrainer's backups name them as the others.
FUSED = {
    "attn.to_qkv": "img_attn.qkv", "attn.to_added_qkv": "txt_attn.qkv",
    "attn.qkv": "img_attn.qkv", "attn.added_qkv": "txt_attn.qkv",
}  # fmt: skip
UP_BIAS = "lora_bias"  # role of peft's lora_B.bias, which is part of the change
SPLIT_ROLES = ("lora_down", "lora_up")  # of sd-scripts, which numbers their parts where it trains q, k and v apart
NO_BIAS = "klein has no biases"
TUCKER = "Tucker factors belong to convolutions, klein has none"
OTHER_KINDS = {  # of change than LoRA, by the roles of their parameters
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
UNSUPPORTED = {
    **OTHER_KINDS,
    "diff_b": NO_BIAS,
    "b_norm": NO_BIAS,
    "lora_mid": TUCKER,
    "lokr_t2": TUCKER,
    "hada_t1": TUCKER,
    "hada_t2": TUCKER,
    **dict.fromkeys(("set_weight", "modules_to_save"), "it replaces the weight, which no strength can scale"),
    "lora_embedding_A": "klein has no embedding tables",
    "lora_embedding_B": "klein has no embedding tables",
}
PARAMETER = re.compile(
    r"(?P<module>.+)\.(?P<role>" + "|".join(map(re.escape, (*ROLES, *UNSUPPORTED))) + r")"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
TEXT_ENCODER = re.compile(
    r"(?:^|[._])(?:text_encoders?|text_model|lora_te\d?|te\d?|clip_[lg]|cond_stage_model|qwen\w*)(?:[._]|$)"
    r"|layers[._]\d+[._](?:self_attn|mlp)[._]"
)
FLUX_1 = re.compile(
    r"double_blocks[._]\d+[._](?:img|txt)_mod[._]|single_blocks[._]\d+[._]modulation[._]|vector_in[._]"
    r"|transformer_blocks[._]\d+[._](?:norm1|norm1_context|ff[._]net|ff_context[._]net)[._]"
    r"|single_transformer_blocks[._]\d+[._](?:attn[._]to_(?:[qkv]|qkv)$|proj_mlp|proj_out|norm[._]linear)|time_text_embed[._]"
)

# What stands before a module of the same name in another model: its block, or the model.
FOREIGN = re.compile(rf"{TEXT_ENCODER.pattern}|(?:^|[._])(?:single|\d+|controlnet\w*|vae)[._]")


class Place(NamedTuple):
    """Where a module stands in BFL's layout.

    ``weight``: BFL's name. ``part`` of ``parts``: which of the equal row slices; parts is 3 for q, k, v apart.
    ``layout``: bfl or diffusers, the one that names it so. ``module``: its full name there. ``prefix``: what
    stood before it.
    """

    weight: str
    part: int
    parts: int
    layout: str
    module: str
    prefix: str = ""


class Parameter(NamedTuple):
    """A key taken apart. ``role``: a value of `ROLES`, a key of `UNSUPPORTED`, or `UP_BIAS`. ``split``: which part of a
    factor that is stored in several, as ``lora_down.0.weight``."""

    module: str
    role: str
    adapter: str | None
    split: int | None = None


def parse(key: str) -> Parameter | None:
    """The parts of a key; None where it is no parameter of a known kind of LoRA."""
    found = PARAMETER.fullmatch(key) if len(key) <= MAX_KEY else None
    if found is None:
        return None
    role = ROLES.get(found["role"], found["role"])
    if found["kind"] == "bias":
        role = UP_BIAS if role == "up" else "diff_b"
    if found["role"] in SPLIT_ROLES and (found["adapter"] or "").isdecimal():
        return Parameter(found["module"], role, None, int(found["adapter"]))
    return Parameter(found["module"], role, found["adapter"])


def locate(module: str) -> Place | None:
    """Where a module stands, whatever wraps it stripped; None where FLUX.2 has no such module.

    It is the longest tail that names a module, after a dot or an underscore; after a dot alone where the name has
    dots and no block, for the last of its words may then be part of one name.
    """
    flat, joints = module.replace(".", "_"), "." if "." in module and "blocks" not in module else "._"
    starts = (0, *(i + 1 for i, letter in enumerate(module) if letter in joints))
    start = next((i for i in starts if flat[i:] in _places()), None)
    if start is None or (start and (FOREIGN.search(module[:start]) or FLUX_1.search(module))):
        return None
    return _places()[flat[start:]]._replace(prefix=module[:start])


def belongs_to_flux_2(key: str) -> bool:
    """Whether a key is a parameter of a known kind of LoRA, of a module that FLUX.2 has."""
    parameter = parse(key)
    return parameter is not None and locate(parameter.module) is not None


@cache
def _places() -> dict[str, Place]:
    """Every module of either layout, dots replaced by underscores."""
    table: dict[str, Place] = {}
    for row in rows(MAX_BLOCKS, MAX_BLOCKS, guidance=True):
        parts = len(row.diffusers)
        named = [("bfl", row.bfl, 0, 1), *(("diffusers", name, i, parts) for i, name in enumerate(row.diffusers))]
        for layout, name, part, count in named:
            module = name.rpartition(".")[0]
            table[module.replace(".", "_")] = Place(row.bfl, part, count, layout, module)
    for i in range(MAX_BLOCKS):
        for fused, bfl in FUSED.items():
            module = f"transformer_blocks.{i}.{fused}"
            table[module.replace(".", "_")] = Place(f"double_blocks.{i}.{bfl}.weight", 0, 1, "diffusers", module)
    return table
