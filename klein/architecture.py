"""Which FLUX model a set of weights is, told from its shapes."""

from __future__ import annotations

from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """Shapes of a FLUX.2 transformer and of the text encoder it was trained with."""

    name: str
    hidden: int
    double_blocks: int
    single_blocks: int
    text_width: int
    text_encoder: str

    @property
    def context(self) -> int:
        """Width of the prompt embeddings: three hidden states side by side."""
        return 3 * self.text_width


KLEIN_9B = Architecture("FLUX.2 [klein] 9B", 4096, 8, 24, 4096, "Qwen3-8B")
KLEIN_4B = Architecture("FLUX.2 [klein] 4B", 3072, 5, 20, 2560, "Qwen3-4B")
DEV = Architecture("FLUX.2 [dev]", 6144, 8, 48, 5120, "Mistral-Small-3.2-24B")
ARCHITECTURES = (KLEIN_9B, KLEIN_4B, DEV)


def recognize(hidden: int, context: int) -> Architecture | None:
    """The FLUX.2 model with these widths; None where no known one has them."""
    return next((known for known in ARCHITECTURES if (known.hidden, known.context) == (hidden, context)), None)


def check_components(transformer: dict[str, Any], text_encoder: dict[str, Any], vae: dict[str, Any]) -> str:
    """Refuse components that cannot work together, from their diffusers configs alone.

    Returns:
        what the transformer is, in words.

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
    if vae.get("latent_channels") != 32:
        raise ValueError(
            f"the VAE has {vae.get('latent_channels')} latent channels, FLUX.2's has 32; "
            "put FLUX.2's VAE into the folder vae."
        )
    return name
