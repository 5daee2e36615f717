"""The files that a klein 9B Base is made of: which are needed, and a check of each that reads only its header."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .architecture import ARCHITECTURES, KLEIN_9B, TINY, Architecture
from .files import read_header
from .identify import FLUX_2_VAE, Identity, identify


class Wanted(NamedTuple):
    """One file that a klein 9B Base needs.

    Attributes:
        what: says what the file holds.
        folder: names its folder in ComfyUI's models.
        sources: give the usual name and the repository of each place to get it.
    """

    what: str
    folder: str
    sources: tuple[tuple[str, str], ...]

    @property
    def advice(self) -> str:
        """The end of a sentence that tells what to get, from where, and where to put it."""
        named = " or ".join(f"{file} (https://huggingface.co/{repository})" for file, repository in self.sources)
        return f"needed is {self.what}, usually {named}, in the folder models/{self.folder}."


WANTED = {
    "transformer": Wanted(
        f"{KLEIN_9B.name} Base",
        "diffusion_models",
        (("flux-2-klein-base-9b-fp8.safetensors", "black-forest-labs/FLUX.2-klein-base-9b-fp8"),),
    ),
    "text_encoder": Wanted(
        KLEIN_9B.text_encoder,
        "text_encoders",
        (("qwen_3_8b_fp8mixed.safetensors", "Comfy-Org/flux2-klein-9B"),),
    ),
    "vae": Wanted(
        "FLUX.2's VAE",
        "vae",
        (
            ("full_encoder_small_decoder.safetensors", "black-forest-labs/FLUX.2-small-decoder"),
            ("flux2-vae.safetensors", "Comfy-Org/flux2-dev"),
        ),
    ),
}
ACCEPTED = {
    "transformer": (KLEIN_9B.name, TINY.name),
    "text_encoder": (KLEIN_9B.text_encoder, TINY.text_encoder),
    "vae": (FLUX_2_VAE,),
}


def check_transformer(path: str | Path) -> Identity:
    """The identity of a FLUX.2 [klein] 9B transformer; a distilled one passes and says so.

    Usage: ``check_transformer("flux-2-klein-base-9b-fp8.safetensors").precision``.

    Args:
        path: names a safetensors file, a folder of shards, or a diffusers folder, whose transformer is judged.

    Raises:
        ValueError: the file cannot be read, is anything else, or is incomplete; the message says what to get.
    """
    return _check(path, "transformer")


def check_text_encoder(path: str | Path) -> Identity:
    """The identity of a Qwen3-8B; arguments and errors are those of `check_transformer`."""
    return _check(path, "text_encoder")


def check_vae(path: str | Path) -> Identity:
    """The identity of FLUX.2's VAE; arguments and errors are those of `check_transformer`."""
    return _check(path, "vae")


def check_pair(transformer: Identity, text_encoder: Identity) -> None:
    """Refuse a text encoder that the transformer was not trained with.

    Usage: ``check_pair(check_transformer("klein.safetensors"), check_text_encoder("qwen.safetensors"))``.

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
