"""What a file of weights is, judged from names, stored shapes and metadata in its header."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .architecture import (
    COMPONENTS,
    DEV,
    FLUX_1_WIDTHS,
    KLEIN_4B,
    KLEIN_9B,
    LATENT_CHANNELS,
    TEXT_LAYERS,
    TINY,
    TINY_MARK,
    recognize,
)
from .files import Header, listed
from .header import BITS
from .layout import names_in, rows

PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "I8": "int8", "U8": "4-bit"}
FLUX_2_VAE = "FLUX.2 VAE"


class Layout(NamedTuple):
    """Names by which a layout, and a FLUX.2 in it, is known.

    Attributes:
        name: ``bfl`` or ``diffusers``.
        image_in, text_in: name weights that every FLUX has.
        flux_2: names a weight that only FLUX.2 has.
    """

    name: str
    image_in: str
    text_in: str
    flux_2: str


LAYOUTS = (
    Layout("bfl", "img_in.weight", "txt_in.weight", "double_stream_modulation_img.lin.weight"),
    Layout("diffusers", "x_embedder.weight", "context_embedder.weight", "double_stream_modulation_img.linear.weight"),
)
TRANSFORMER_PREFIXES = ("", "model.diffusion_model.", "model.")
TEXT_PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")
VAE_PREFIXES = ("", "vae.", "first_stage_model.")
DIFFUSION_BLOCKS = (
    "double_blocks.", "transformer_blocks.", "single_transformer_blocks.", "joint_blocks.", "blocks.", "input_blocks.",
    "down_blocks.", "noise_refiner.",
)  # fmt: skip
FOREIGN_QUANTISATION = {
    ".quant_state.bitsandbytes__": "weights packed by bitsandbytes",
    ".qweight": "weights packed by Nunchaku, AWQ or GPTQ",
}
LORA = re.compile(r"lora_|\.lora\.|lokr_|hada_|lycoris_|dora_scale|oft_blocks")


class Identity(NamedTuple):
    """What a file of weights is.

    Attributes:
        file: names the file.
        kind: transformer, text_encoder, vae, lora or unknown.
        name: says in words which one it is.
        layout: bfl or diffusers; None where a kind has only one.
        prefix: stands before the layout's own names.
        precision: says in words how its matrices are stored, the largest share first.
        tiny: whether it is marked as random test weights.
        distilled: whether it is a distilled klein.
        width: counts the hidden states, or the latent channels of a VAE; None where it is unknown.
        context: width of the prompt embeddings that a transformer takes.
        lacks: says in words what an incomplete one misses; empty for a whole one.
    """

    file: str
    kind: str
    name: str
    layout: str | None = None
    prefix: str = ""
    precision: str = "unknown"
    tiny: bool = False
    distilled: bool = False
    width: int | None = None
    context: int | None = None
    lacks: str = ""

    def __str__(self) -> str:
        words = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "VAE", "lora": "LoRA"}
        if self.kind not in words:
            return f"a file of unknown kind ({self.name})" if self.name != "unknown" else "a file of unknown kind"
        named = words[self.kind] if self.name in (words[self.kind], "") else f"{words[self.kind]} ({self.name})"
        return f"an incomplete {named}, without {self.lacks}" if self.lacks else f"a {named}"


def identify(header: Header) -> Identity:
    """What the weights are, from names, stored shapes and metadata; never raises on a whole header.

    Usage: ``print(identify(read_header("unknown.safetensors")))``.

    Packed 4-bit weights store half of their columns, so widths are read from rows or corrected for packing.
    """
    judged = (judge(header) for judge in (_packed, _transformer, _text_encoder, _vae, _lora))
    found = next((identity for identity in judged if identity is not None), Identity("", "unknown", "unknown"))
    return found._replace(
        file=header.label, precision=_precision(header), tiny=_is_marked(header), distilled=_is_distilled(header)
    )


def _packed(header: Header) -> Identity | None:
    for part, words in FOREIGN_QUANTISATION.items():
        if any(part in name for name in header.tensors):
            return Identity("", "unknown", words)
    return None


def _transformer(header: Header) -> Identity | None:
    for layout in LAYOUTS:
        prefix = _prefix(header, layout.text_in, TRANSFORMER_PREFIXES)
        if prefix is not None and _shape(header, prefix + layout.image_in):
            return _flux(header, layout, prefix)
    for prefix in TRANSFORMER_PREFIXES:
        starts = tuple(prefix + block for block in DIFFUSION_BLOCKS)
        named = [name for name in header.tensors if name.startswith(starts)]
        if named and not any(LORA.search(name) for name in named):
            return Identity("", "transformer", "another diffusion model")
    return None


def _flux(header: Header, layout: Layout, prefix: str) -> Identity:
    hidden = header.tensors[prefix + layout.image_in].shape[0]
    context = _columns(header, prefix + layout.text_in, hidden)
    found = Identity(
        "", "transformer", "another diffusion model", layout.name, prefix=prefix, width=hidden, context=context
    )
    if prefix + layout.flux_2 not in header.tensors:
        chroma = any(".distilled_guidance_layer." in f".{name}" for name in header.tensors)
        is_flux_1 = (hidden, context) == FLUX_1_WIDTHS and not chroma
        return found._replace(name="FLUX.1") if is_flux_1 else found
    known = recognize(hidden, context)
    if _is_marked(header) and (hidden, context) == (TINY.hidden, TINY.context):
        known = TINY
    if known is None:
        return found._replace(name=f"FLUX.2 transformer of hidden width {hidden}")
    needed = names_in(rows(known.double_blocks, known.single_blocks), layout.name)
    return found._replace(name=known.name, lacks=_lacking(header, prefix, needed))


def _text_encoder(header: Header) -> Identity | None:
    if any("encoder.block.0.layer.0.SelfAttention." in name for name in header.tensors):
        return Identity("", "text_encoder", "T5")
    if any("text_model.encoder.layers.0." in name for name in header.tensors):
        return Identity("", "text_encoder", "CLIP")
    norm = "layers.0.post_attention_layernorm.weight"
    prefix = _prefix(header, norm, TEXT_PREFIXES)
    if prefix is None:
        return None
    width = header.tensors[prefix + norm].shape[-1]
    found = Identity("", "text_encoder", f"another language model of width {width}", prefix=prefix, width=width)
    if f"{prefix}layers.0.self_attn.q_norm.weight" not in header.tensors:
        return found._replace(name=DEV.text_encoder) if width == DEV.text_width else found
    if f"{prefix}layers.0.post_feedforward_layernorm.weight" in header.tensors:
        return found
    if "language_model" in prefix or any("visual." in name for name in header.tensors):
        return found._replace(name=f"Qwen3-VL of width {width}")
    known = (KLEIN_9B, KLEIN_4B, TINY) if _is_marked(header) else (KLEIN_9B, KLEIN_4B)
    name = next((one.text_encoder for one in known if one.text_width == width), f"another Qwen3 of width {width}")
    return found._replace(name=name, lacks=_lacking(header, prefix, _qwen3_names()))


def _qwen3_names() -> list[str]:
    parts = (
        "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    )  # fmt: skip
    return ["embed_tokens.weight", *(f"layers.{i}.{part}.weight" for i in range(TEXT_LAYERS) for part in parts)]


def _vae(header: Header) -> Identity | None:
    decoder = "decoder.conv_in.weight"
    prefix = _prefix(header, decoder, VAE_PREFIXES)
    if prefix is None:
        parts = [name for name in header.tensors if name.startswith("decoder.")]
        return Identity("", "vae", "another VAE, or a part of one") if parts else None
    shape = header.tensors[prefix + decoder].shape
    channels = shape[1] if len(shape) > 1 else 0
    layout = "diffusers" if any(name.startswith(f"{prefix}decoder.up_blocks.") for name in header.tensors) else "bfl"
    found = Identity("", "vae", f"another VAE, of {channels} latent channels", layout, prefix=prefix, width=channels)
    norm = header.tensors.get(f"{prefix}bn.running_mean")
    if len(shape) != 4 or channels != LATENT_CHANNELS or norm is None or norm.shape != (4 * LATENT_CHANNELS,):
        return found
    ends = ("conv_in.weight", "conv_out.weight")
    needed = ["bn.running_var", *(f"{half}.{end}" for half in ("encoder", "decoder") for end in ends)]
    return found._replace(name=FLUX_2_VAE, lacks=_lacking(header, prefix, needed))


def _lora(header: Header) -> Identity | None:
    return Identity("", "lora", "LoRA") if any(LORA.search(name) for name in header.tensors) else None


def _prefix(header: Header, name: str, prefixes: Iterable[str]) -> str | None:
    return next((prefix for prefix in prefixes if len(_shape(header, prefix + name)) > 0), None)


def _shape(header: Header, name: str) -> tuple[int, ...]:
    return header.tensors[name].shape if name in header.tensors else ()


def _columns(header: Header, name: str, hidden: int) -> int:
    """Columns of a weight as they are when unpacked."""
    dtype, shape = header.tensors[name].dtype, header.tensors[name].shape
    columns = shape[1] if len(shape) > 1 else 0
    if dtype == "U8":
        return 2 * columns
    # An int8 tensor holds either one weight a byte, or two of 4 bits; its header does not tell which.
    packed = dtype == "I8" and not recognize(hidden, columns) and recognize(hidden, 2 * columns)
    return 2 * columns if packed else columns


def _lacking(header: Header, prefix: str, needed: Iterable[str]) -> str:
    """Which needed tensors are not there, in words; a norm's ``scale`` may be called ``weight``, as ComfyUI allows."""
    missing = [
        name
        for name in needed
        if prefix + name not in header.tensors and prefix + re.sub(r"\.scale$", ".weight", name) not in header.tensors
    ]
    return f"{len(missing)} of its tensors ({listed(missing)})" if missing else ""


def _is_marked(header: Header) -> bool:
    return header.metadata.get(TINY_MARK[0]) == TINY_MARK[1]


def _is_distilled(header: Header) -> bool:
    """Whether the metadata says so; without it, published klein files are distilled unless their name says base."""
    said = header.metadata.get("is_distilled", "").lower()
    if said in ("true", "false"):
        return said == "true"
    path = header.path.parent if header.path.name in COMPONENTS else header.path
    name = path.name.lower()
    return "klein" in name and "base" not in name


def _precision(header: Header) -> str:
    sizes: Counter[str] = Counter()
    for name, tensor in header.tensors.items():
        if len(tensor.shape) > 1 and "scale" not in name.rpartition(".")[2]:
            sizes[_format(header, name)] += math.prod(tensor.shape) * BITS.get(tensor.dtype, 8)
    return " + ".join(words for words, _ in sizes.most_common()) or "unknown"


def _format(header: Header, name: str) -> str:
    dtype, base = header.tensors[name].dtype, name.removesuffix("weight")
    scale = header.tensors.get(f"{base}weight_scale") or header.tensors.get(f"{base}scale_weight")
    if dtype == "U8" and f"{base}weight_scale_2" in header.tensors:
        return "nvfp4"
    if not dtype.startswith("F8"):
        return PRECISIONS.get(dtype, dtype.lower())
    if scale is None:
        return "fp8"
    return "mxfp8" if len(scale.shape) == 2 and scale.dtype in ("U8", "F8_E8M0") else "scaled fp8"
