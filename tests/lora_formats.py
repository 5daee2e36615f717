"""LoRA files in every format that is out there, each with the change of every weight that it means.

The changes are worked out here, by plain products and `diffusers_to_bfl`, and not by the code under test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from klein_cns.klein.convert import diffusers_to_bfl
from torch import Tensor

RANK = 3


class Format(NamedTuple):
    """A way to write a LoRA.

    ``layout``: bfl, diffusers, or one of `FUSED`. ``key``: of a module's name and a parameter. ``kind``: which factors.
    ``magnitude``: what a DoRA's is called where it has one axis.
    """

    layout: str
    key: Callable[[str, str], str]
    kind: str = "lora"
    alpha: bool = False
    names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    config: Mapping[str, Any] = {}
    modules: tuple[str, ...] = ()  # parts of the names of those that are changed; all where empty
    magnitude: str = "lora_magnitude_vector"


class Sample(NamedTuple):
    """``delta``: BFL's name -> the change of the base weight, for every linear."""

    tensors: dict[str, Tensor]
    delta: dict[str, Tensor]
    modules: int
    config: Mapping[str, Any]


def dotted(prefix: str) -> Callable[[str, str], str]:
    return lambda module, parameter: f"{prefix}{module}.{parameter}"


def joined(prefix: str) -> Callable[[str, str], str]:
    return lambda module, parameter: f"{prefix}{module.replace('.', '_')}.{parameter}"


KOHYA = ("lora_down.weight", "lora_up.weight")
DOTS = ("lora.down.weight", "lora.up.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5}
PATTERNS = {
    "alpha_pattern": {"to_q": 2, r"transformer_blocks\.1\.attn\.to_out\.0": 7.5, "proj_out": 1, ".*linear_in": 9},
    "rank_pattern": {"to_q": RANK},
}

# The rows of the table of formats in the wild, in its order, then what else a trainer may write.
FORMATS = {
    "transformer.<diffusers>": Format("diffusers", dotted("transformer.")),
    "<diffusers>": Format("diffusers", dotted("")),
    "<diffusers> lora_A.default": Format("diffusers", dotted("transformer."), names=NAMED),
    "transformer.<diffusers> + alpha": Format("diffusers", dotted("transformer."), alpha=True),
    "diffusion_model.<BFL>": Format("bfl", dotted("diffusion_model.")),
    "diffusion_model.<BFL> + alpha": Format("bfl", dotted("diffusion_model."), alpha=True),
    "diffusion_model.<BFL> lora_down/up": Format("bfl", dotted("diffusion_model."), alpha=True, names=KOHYA),
    "diffusion_model.<diffusers>": Format("diffusers", dotted("diffusion_model.")),
    "<BFL>": Format("bfl", dotted("")),
    "transformer.<BFL>": Format("bfl", dotted("transformer.")),
    "base_model.model.<BFL>": Format("bfl", dotted("base_model.model.")),
    "base_model.model.<diffusers>": Format("diffusers", dotted("base_model.model.")),
    "transformer.base_model.model.<diffusers>": Format("diffusers", dotted("transformer.base_model.model.")),
    "lora_unet_<BFL>": Format("bfl", joined("lora_unet_"), alpha=True, names=KOHYA),
    "lora_unet_<diffusers>": Format("diffusers", joined("lora_unet_"), alpha=True, names=KOHYA),
    "lora_transformer_<diffusers>": Format("diffusers", joined("lora_transformer_"), alpha=True, names=KOHYA),
    "lycoris_<diffusers> LoKr": Format("diffusers", joined("lycoris_"), "lokr", alpha=True),
    "lycoris_<BFL> LoKr": Format("bfl", joined("lycoris_"), "lokr", alpha=True),
    "lora_unet_<BFL> LoKr": Format("bfl", joined("lora_unet_"), "lokr", alpha=True),
    "diffusion_model.<BFL> LoKr": Format("bfl", dotted("diffusion_model."), "lokr", alpha=True),
    "lora_unet_<BFL> LoHa": Format("bfl", joined("lora_unet_"), "loha", alpha=True),
    "model.diffusion_model.<BFL>": Format("bfl", dotted("model.diffusion_model.")),
    "unet.<BFL>": Format("bfl", dotted("unet.")),
    "transformer.<diffusers> lora.down/up": Format("diffusers", dotted("transformer."), names=DOTS),
    "nested prefixes": Format("diffusers", dotted("module.transformer._orig_mod.base_model.model.")),
    "lycoris_<diffusers> LoHa": Format("diffusers", joined("lycoris_"), "loha", alpha=True),
    "diffusion_model.<BFL> diff": Format("bfl", dotted("diffusion_model."), "diff"),
    "transformer.<diffusers> diff": Format("diffusers", dotted("transformer."), "diff"),
    "peft, alpha": Format("diffusers", dotted("base_model.model."), config=CONFIG),
    "peft, rsLoRA": Format("diffusers", dotted("base_model.model."), config={**CONFIG, "use_rslora": True}),
    "peft, patterns": Format("diffusers", dotted("base_model.model."), config={**CONFIG, **PATTERNS}),
    "peft, LoKr": Format(
        "diffusers", dotted("base_model.model."), "lokr", config={"peft_type": "LOKR", "r": RANK, "alpha": 5}
    ),
    "peft, LoKr, patterns": Format(
        "diffusers", dotted("base_model.model."), "lokr",
        config={"peft_type": "LOKR", "r": 2 * RANK, "alpha": 5, "rank_pattern": {".*": RANK}},
    ),
    "peft, DoRA": Format("diffusers", dotted("base_model.model."), "dora", config={**CONFIG, "use_dora": True}),
    "lora_unet_<BFL> DoRA": Format("bfl", joined("lora_unet_"), "dora", alpha=True, names=KOHYA),
    "lora_unet_<BFL> DoRA of columns": Format("bfl", joined("lora_unet_"), "column dora", alpha=True, names=KOHYA),
    "lora_transformer_<diffusers> DoRA of columns": Format(
        "diffusers", joined("lora_transformer_"), "column dora", alpha=True, names=KOHYA,
    ),
    "ai-toolkit, DoRA": Format("bfl", dotted("diffusion_model."), "dora", magnitude="magnitude"),
    "ai-toolkit, LoKr in float16": Format("bfl", dotted("diffusion_model."), "whole lokr"),
    "fused q, k and v": Format("fused", dotted("transformer."), alpha=True),
    "fused q, k and v, LoKr": Format("fused", joined("lycoris_"), "lokr", alpha=True),
    "fused q, k and v, DoRA": Format("fused", dotted("base_model.model."), "dora", config={**CONFIG, "use_dora": True}),
    "OneTrainer's backup": Format("fused by OneTrainer", dotted("transformer."), alpha=True, names=KOHYA),
    "to_q and to_v alone": Format("diffusers", dotted("transformer."), modules=("to_q", "to_v")),
    "global modules alone": Format(
        "diffusers", dotted("transformer."), alpha=True, modules=("modulation", "time_guidance_embed", "norm_out"),
    ),
}  # fmt: skip

# The form of `lora_new_form`, which the package does not have.
NEW_FORM = {
    "transformer.<diffusers> rank one": Format("diffusers", dotted("transformer."), "rank one", alpha=True),
    "lora_unet_<BFL> rank one": Format("bfl", joined("lora_unet_"), "rank one", alpha=True),
}

# diffusers' names, but q, k and v in one: what that is called in the two streams of a double block.
FUSED = {"fused": ("attn.to_qkv", "attn.to_added_qkv"), "fused by OneTrainer": ("attn.qkv", "attn.added_qkv")}
PARTS = (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))


def fuse(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A state dict in diffusers' layout with q, k and v in one."""
    fused = dict(state)
    for parts, name in zip(PARTS, FUSED[layout], strict=True):
        for first in [key for key in state if f".{parts[0]}." in key]:
            rows = [fused.pop(first.replace(parts[0], part)) for part in parts]
            fused[first.replace(parts[0], name)] = torch.cat(rows)
    return fused


def unfuse(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same state dict in diffusers' own layout."""
    parts_of = dict(zip(FUSED[layout], PARTS, strict=True))
    split = {}
    for key, tensor in state.items():
        name = next((name for name in parts_of if f".{name}." in key), None)
        if name is None:
            split[key] = tensor
        else:
            rows = zip(parts_of[name], tensor.chunk(3), strict=True)
            split |= {key.replace(name, part): chunk for part, chunk in rows}
    return split


def linears(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the linear modules of a state dict."""
    return [name.removesuffix(".weight") for name, tensor in state.items() if tensor.ndim == 2]


def write(
    form: Format, diffusers: Mapping[str, Tensor], seed: int, strength: float = 1.0, size: float = 0.02
) -> Sample:
    """A LoRA of a ``Flux2Transformer2DModel`` with these weights, and what it does at a strength.

    Args:
        size: of the change at strength 1, against weights of deviation columns^-1/2.
    """
    generator = torch.Generator().manual_seed(seed)
    if form.layout in FUSED:
        base = fuse(diffusers, form.layout)
    else:
        base = dict(diffusers) if form.layout == "diffusers" else diffusers_to_bfl(diffusers)
    tensors: dict[str, Tensor] = {}
    delta = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    chosen = [name for name in linears(base) if not form.modules or any(part in name for part in form.modules)]
    for i, module in enumerate(chosen):
        weight = base[f"{module}.weight"]
        factors, change, rank = _factors(form, i, weight.shape, generator)
        scale = size * weight.shape[1] ** -0.5 / float(change.std())
        factors[next(iter(factors))] *= scale
        change = change * scale
        if form.kind == "whole lokr":
            factors = {name: factor.half() for name, factor in factors.items()}
            change = torch.kron(*(factor.float() for factor in factors.values()))
            tensors[form.key(module, "alpha")] = torch.tensor(9999999999).half()
        alpha = _alpha(form, module)
        if form.alpha:
            tensors[form.key(module, "alpha")] = torch.tensor(alpha)
        if alpha is not None and rank is not None:
            change = change * alpha / (math.sqrt(rank) if form.config.get("use_rslora") else rank)
        change = strength * change
        if form.kind == "column dora":
            norms = weight.norm(dim=0, keepdim=True)
            magnitude = norms * (1 + 0.1 * torch.randn(norms.shape, generator=generator))
            tensors[form.key(module, "dora_scale")] = magnitude
            change = dora(weight.T, change.T, magnitude[0]).T
        if form.kind == "dora":
            magnitude = weight.norm(dim=1) * (1 + 0.1 * torch.randn(weight.shape[0], generator=generator))
            peft = form.names[0].startswith("lora_A")
            name = form.magnitude if peft else "dora_scale"
            tensors[form.key(module, name)] = magnitude if peft else magnitude[:, None].clone()
            change = dora(weight, change, magnitude)
        tensors |= {form.key(module, name): factor.contiguous() for name, factor in factors.items()}
        delta[f"{module}.weight"] = change
    if form.layout in FUSED:
        delta = unfuse(delta, form.layout)
    changed = delta if form.layout == "bfl" else diffusers_to_bfl(delta)
    return Sample(tensors, {n: d for n, d in changed.items() if d.ndim == 2}, len(chosen), form.config)


def dora(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """What a DoRA adds to a weight, in float64."""
    direction = weight.double() + change.double()
    return (magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True) - weight).float()


def save(sample: Sample, path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the file, and an adapter_config.json beside it where the sample has one."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(sample.tensors, path, metadata=dict(metadata) if metadata else None)
    if sample.config:
        (path.parent / "adapter_config.json").write_text(json.dumps(dict(sample.config)))


def _alpha(form: Format, module: str) -> float | None:
    """The alpha of a module; for the patterns of `PATTERNS`, by hand."""
    if form.alpha:
        return 2.0 + len(module) % 3
    config = form.config
    if "alpha_pattern" in config:
        if module.endswith("to_q") and not module.endswith("add_to_q"):
            return 2
        if module == "transformer_blocks.1.attn.to_out.0":
            return 7.5
        if module == "proj_out":
            return 1
        return 9 if module.endswith("linear_in") else config["lora_alpha"]
    return config.get("lora_alpha", config.get("alpha"))


Factors = tuple[dict[str, Tensor], Tensor, Any]


def _factors(form: Format, i: int, shape: torch.Size, generator: torch.Generator) -> Factors:
    """Random factors of one module, their product, and the rank that alpha is divided by (None: it is not used)."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    out, into = shape
    if form.kind == "diff":
        diff = draw(out, into)
        return {"diff": diff}, diff.clone(), None
    if form.kind == "loha":
        a1, b1, a2, b2 = draw(out, RANK), draw(RANK, into), draw(out, RANK), draw(RANK, into)
        named = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        return named, (a1 @ b1) * (a2 @ b2), RANK
    if form.kind == "whole lokr":
        w1, w2 = draw(4, 4), draw(out // 4, into // 4)
        return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2), None
    if form.kind == "rank one":
        rows, columns = draw(out), draw(into)
        return {"rank_one_rows": rows, "rank_one_columns": columns}, torch.outer(rows, columns), 1
    if form.kind == "lokr":
        return _lokr(form, i, out, into, draw)
    a, b = draw(RANK, into), draw(out, RANK)
    return dict(zip(form.names, (a, b), strict=True)), b @ a, RANK


def _lokr(form: Format, i: int, out: int, into: int, draw: Callable[..., Tensor]) -> Factors:
    """Whole and decomposed factors in turn. Of whole ones LyCORIS uses no alpha, peft does."""
    rows, columns = (4, 8)[i % 2], (2, 4)[i % 2]
    w1, w2 = draw(rows, columns), draw(out // rows, into // columns)
    if i % 3 == 0:
        always = RANK if form.config.get("peft_type") == "LOKR" else None
        return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2), always
    a, b = draw(out // rows, RANK), draw(RANK, into // columns)
    if i % 3 == 1:
        return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, torch.kron(w1, a @ b), RANK
    c, d = draw(rows, RANK), draw(RANK, columns)
    named = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b}
    return named, torch.kron(c @ d, a @ b), RANK
