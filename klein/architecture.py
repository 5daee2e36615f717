"""Which FLUX model a set of weights is, told from its shapes, and which files a klein 9B Base is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..weights.architecture import DEV, KLEIN_9B, recognize

TEXT_LAYERS = 28  # the last hidden state that klein reads is the 27th, and it must not be the normed final one
LATENT_CHANNELS = 32


class Wanted(NamedTuple):
    """One file of a klein 9B Base: what it holds, its folder in ComfyUI, (usual name, repository) of each source."""

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


def check_components(transformer: dict[str, Any], text_encoder: dict[str, Any], vae: dict[str, Any]) -> None:
    """Refuse components that cannot work together, from their diffusers configs alone.

    Raises:
        ValueError: a transformer that is not a klein, a text encoder of another width, a foreign VAE.
    """
    hidden = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    context, width = transformer["joint_attention_dim"], text_encoder["hidden_size"]
    known = recognize(hidden, context)
    name = known.name if known else f"FLUX.2 transformer of hidden width {hidden}"
    if known is DEV or transformer.get("guidance_embeds"):
        raise ValueError(f"the transformer is {name} with a guidance embedding; load {KLEIN_9B.name} Base.")
    if context != 3 * width:
        wanted = f"{known.text_encoder} (width {known.text_width})" if known else f"one of width {context / 3:g}"
        raise ValueError(
            f"the text encoder has width {width}, but {name} was trained with {wanted}; "
            "put that model into the folder text_encoder."
        )
    if vae.get("latent_channels") != LATENT_CHANNELS:
        raise ValueError(
            f"the VAE has {vae.get('latent_channels')} latent channels, FLUX.2's has {LATENT_CHANNELS}; "
            "put FLUX.2's VAE into the folder vae."
        )
