"""What a file of weights is, judged from its safetensors header alone, before gigabytes are read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..weights.architecture import (
    ARCHITECTURES,
    DEV,
    FLUX_1_WIDTHS,
    KLEIN_4B,
    KLEIN_9B,
    TINY,
    Architecture,
    recognize,
)
from ..weights.header import BITS, Tensor, read_file_header
from ..weights.layout import names_in, rows
from .architecture import LATENT_CHANNELS, TEXT_LAYERS, WANTED
from .tiny import MARK

PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "I8": "int8", "U8": "4-bit"}
FLUX_2_VAE = "FLUX.2 VAE"
ACCEPTED = {
    "transformer": (KLEIN_9B.name, TINY.name),
    "text_encoder": (KLEIN_9B.text_encoder, TINY.text_encoder),
    "vae": (FLUX_2_VAE,),
}


class Layout(NamedTuple):
    """Names by which a layout, and a FLUX.2 in it, is known."""

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


class Header(NamedTuple):
    """The headers of one file, or of all shards of a folder.

    ``metadata`` is the files' own; for a component of a diffusers folder, ``is_distilled`` of its model_index.json too.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def label(self) -> str:
        """The file's name; for anything but a .safetensors file, its folder's name too."""
        return _label(self.path)


class Identity(NamedTuple):
    """What a file of weights is.

    ``kind``: transformer, text_encoder, vae, lora or unknown. ``name``: which one, in words. ``layout``: bfl,
    diffusers, or None where a kind has only one. ``prefix``: before the layout's own names. ``precision``: the
    formats of its matrices in words, the largest share first. ``tiny``: marked as random test weights. ``width``: of
    the hidden states, or the latent channels of a VAE. ``context``: of the prompt embeddings a transformer takes.
    ``lacks``: what an incomplete one misses, in words; empty for a whole one.
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


def check_transformer(path: str | Path) -> Identity:
    """The identity of a FLUX.2 [klein] 9B transformer; a distilled one passes and says so.

    Args:
        path: a safetensors file, a folder of shards, or a diffusers folder (its transformer is judged).

    Raises:
        ValueError: a file that cannot be read, is anything else, or is incomplete.
    """
    return _check(path, "transformer")


def check_text_encoder(path: str | Path) -> Identity:
    """The identity of a Qwen3-8B; arguments and errors as `check_transformer`."""
    return _check(path, "text_encoder")


def check_vae(path: str | Path) -> Identity:
    """The identity of FLUX.2's VAE; arguments and errors as `check_transformer`."""
    return _check(path, "vae")


def check_pair(transformer: Identity, text_encoder: Identity) -> None:
    """Refuse a text encoder that the transformer was not trained with.

    Raises:
        ValueError: its three hidden states side by side are not as wide as the transformer's prompt embeddings.
    """
    if transformer.context == 3 * (text_encoder.width or 0):
        return
    trained = _architecture(transformer)
    if trained is KLEIN_9B:
        advice = WANTED["text_encoder"].advice
    elif trained:
        advice = f"needed is {trained.text_encoder}, of width {trained.text_width}."
    else:
        advice = f"needed is one of width {(transformer.context or 0) / 3:g}."
    raise ValueError(
        f"{text_encoder.file} is {text_encoder} of width {text_encoder.width}, but {transformer.file} is "
        f"{transformer}, trained with another; {advice}"
    )


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that hold one component: the file itself, or the shards in a folder.

    Raises:
        ValueError: nothing there, a shard missing, or several sets of weights side by side.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{_label(path)} does not exist.")
    index = _index(path)
    if index:
        return _shards(path, sorted(set(index.values())))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{_label(path)} is a folder without a .safetensors file.")
    numbered = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", file.name) for file in files]
    first = numbered[0]
    if first and all(found and (found[1], found[3]) == (first[1], first[3]) for found in numbered):
        return _shards(path, [f"{first[1]}-{i + 1:05}-of-{first[3]}.safetensors" for i in range(int(first[3]))])
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{_label(path)} holds several sets of weights ({names}), of which one must be kept.")
    return files


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, or the merged ones of a folder's shards; no tensor is read.

    Args:
        path: a file, or a folder such as ``transformer`` of a diffusers folder.

    Raises:
        ValueError: a file that is missing, empty, truncated, damaged or no safetensors, naming it and the fault.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    metadata = _model_index(path)
    for file in weight_files(path):
        label = _label(path) if file == path else f"{_label(path)}/{file.name}"
        found, extra = read_file_header(file, label)
        twice = next((name for name in found if name in tensors), None)
        if twice:
            raise ValueError(f"{label} holds {twice}, which another shard holds too.")
        tensors |= found
        metadata |= extra
    lost = [name for name in _index(path) if name not in tensors]
    if lost:
        raise ValueError(f"{_label(path)} lacks {_listed(lost)}, which its index names.")
    return Header(path, tensors, metadata)


def identify(header: Header) -> Identity:
    """What the weights are, from names, stored shapes and metadata; never raises on a whole header.

    Packed 4-bit weights store half of their columns, so widths are read from rows or corrected for packing.
    """
    found = next(
        (found for judge in (_packed, _transformer, _text_encoder, _vae, _lora) if (found := judge(header))),
        Identity("", "unknown", "unknown"),
    )
    return found._replace(
        file=header.label, precision=_precision(header), tiny=_is_marked(header), distilled=_is_distilled(header)
    )


def _check(path: str | Path, kind: str) -> Identity:
    path, advice = Path(path), WANTED[kind].advice
    if (path / "model_index.json").is_file():
        path = path / kind
    try:
        found = identify(read_header(path))
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}; {advice}") from error
    if found.kind != kind or found.name not in ACCEPTED[kind] or found.lacks:
        raise ValueError(f"{found.file} is {found}; {advice}")
    return found


def _architecture(transformer: Identity) -> Architecture | None:
    known = (*ARCHITECTURES, TINY)
    return next((one for one in known if (one.hidden, one.context) == (transformer.width, transformer.context)), None)


# Reading


def _label(path: Path) -> str:
    return path.name if path.suffix == ".safetensors" else f"{path.parent.name}/{path.name}"


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, of the index in a folder; empty where there is none."""
    indices = sorted(path.glob("*.safetensors.index.json"), key=lambda file: len(file.name))
    if not indices:
        return {}
    problem = f"{_label(path)}/{indices[0].name} is no index of shards"
    try:
        index = json.loads(indices[0].read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{problem}.") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{problem}.")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard or re.search(r"[/\\:\0]", shard) or shard.startswith("."):
            raise ValueError(f"{problem}: {shard!r} is no file name.")
    return shards


def _shards(folder: Path, names: list[str]) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{_label(folder)} lacks {len(missing)} of {len(names)} shards ({_listed(missing)}).")
    return [folder / name for name in names]


def _model_index(path: Path) -> dict[str, str]:
    """``is_distilled`` of the model_index.json above a component, as metadata."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        try:
            index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(index, dict) and isinstance(index.get("is_distilled"), bool):
            return {"is_distilled": str(index["is_distilled"]).lower()}
    return {}


# Judging


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
    dtype, shape = header.tensors[name]
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
    return f"{len(missing)} of its tensors ({_listed(missing)})" if missing else ""


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _is_marked(header: Header) -> bool:
    return header.metadata.get(MARK[0]) == MARK[1]


def _is_distilled(header: Header) -> bool:
    """By what the metadata says, else by the name: published klein files are distilled unless called base."""
    said = header.metadata.get("is_distilled", "").lower()
    if said in ("true", "false"):
        return said == "true"
    path = header.path.parent if header.path.name in WANTED else header.path
    name = path.name.lower()
    return "klein" in name and "base" not in name


def _precision(header: Header) -> str:
    sizes: Counter[str] = Counter()
    for name, (dtype, shape) in header.tensors.items():
        if len(shape) > 1 and "scale" not in name.rpartition(".")[2]:
            sizes[_format(header, name)] += math.prod(shape) * BITS.get(dtype, 8)
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
