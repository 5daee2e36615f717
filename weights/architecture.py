"""The FLUX.2 transformers there are, and the shape of each of their weights."""

from __future__ import annotations

from typing import NamedTuple

from .layout import rows

HEAD_WIDTH = 128
PACKED_CHANNELS = 128
TIME_WIDTH = 256  # of the sinusoidal embedding
TEXT_LAYERS = 28  # the last hidden state that klein reads is the 27th, and it must not be the normed final one
LATENT_CHANNELS = 32  # of the VAE, before the 2x2 patches
COMPONENTS = ("transformer", "text_encoder", "vae")  # of a klein, as its diffusers folder calls them
TINY_MARK = ("klein_cns", "tiny")  # in the metadata of every safetensors file of a tiny klein
# (rows, columns) of the weights whose names hold the part: in hidden widths, or by name.
SIZES: dict[str, tuple[int | str, int | str]] = {
    "img_in.": (1, "latent"),
    "txt_in.": (1, "context"),
    "time_in.in_layer.": (1, "time"),
    "time_in.out_layer.": (1, 1),
    "guidance_in.in_layer.": (1, "time"),
    "guidance_in.out_layer.": (1, 1),
    "double_stream_modulation_": (6, 1),
    "single_stream_modulation.": (3, 1),
    "final_layer.adaLN_modulation.": (2, 1),
    "final_layer.linear.": ("latent", 1),
    "_attn.qkv.": (3, 1),
    "_attn.proj.": (1, 1),
    "_mlp.0.": (6, 1),
    "_mlp.2.": (1, 3),
    ".linear1.": (9, 1),
    ".linear2.": (1, 4),
}


class Architecture(NamedTuple):
    """Shapes of a FLUX.2 transformer and of the text encoder it was trained with.

    Attributes:
        name: names the model to a user.
        hidden: width of the hidden states.
        double_blocks, single_blocks: count the blocks of each kind.
        text_width: width of the text encoder's hidden states.
        text_encoder: names the text encoder to a user.
        guidance: whether the model embeds a guidance scale.
    """

    name: str
    hidden: int
    double_blocks: int
    single_blocks: int
    text_width: int
    text_encoder: str
    guidance: bool = False

    @property
    def context(self) -> int:
        """Width of the prompt embeddings: three hidden states side by side."""
        return 3 * self.text_width

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight under BFL's name.

        >>> KLEIN_9B.shapes()["img_in.weight"]
        (4096, 128)
        """
        return {row.bfl: self._shape(row.bfl) for row in rows(self.double_blocks, self.single_blocks, self.guidance)}

    def _shape(self, name: str) -> tuple[int, ...]:
        if name.endswith(".scale"):
            return (HEAD_WIDTH,)
        out, into = next(sizes for part, sizes in SIZES.items() if part in name)
        widths = {"latent": PACKED_CHANNELS, "time": TIME_WIDTH, "context": self.context}
        return tuple(widths[size] if isinstance(size, str) else size * self.hidden for size in (out, into))


KLEIN_9B = Architecture("FLUX.2 [klein] 9B", 4096, 8, 24, 4096, "Qwen3-8B")
KLEIN_4B = Architecture("FLUX.2 [klein] 4B", 3072, 5, 20, 2560, "Qwen3-4B")
DEV = Architecture("FLUX.2 [dev]", 6144, 8, 48, 5120, "Mistral-Small-3.2-24B", guidance=True)
ARCHITECTURES = (KLEIN_9B, KLEIN_4B, DEV)
TINY = Architecture("random test weights of a tiny klein", 128, 2, 3, 32, "random test weights of a tiny Qwen3")
FLUX_1_WIDTHS = (3072, 4096)  # hidden, context


def recognize(hidden: int, context: int) -> Architecture | None:
    """The FLUX.2 model with these widths; None where no known one has them.

    >>> recognize(4096, 12288).name
    'FLUX.2 [klein] 9B'
    """
    return next((known for known in ARCHITECTURES if (known.hidden, known.context) == (hidden, context)), None)


def from_sizes(hidden: int, context: int, double_blocks: int, single_blocks: int) -> Architecture:
    """The architecture of a FLUX.2 transformer; known widths give it the known model's name.

    >>> from_sizes(3072, 7680, 5, 20) == KLEIN_4B
    True

    Args:
        hidden: width of the hidden states.
        context: width of the prompt embeddings.
        double_blocks, single_blocks: count the blocks of each kind.
    """
    known = TINY if (hidden, context) == (TINY.hidden, TINY.context) else recognize(hidden, context)
    name = known.name if known else f"a FLUX.2 transformer of hidden width {hidden}"
    text_encoder = known.text_encoder if known else "unknown"
    guidance = known is not None and known.guidance
    return Architecture(name, hidden, double_blocks, single_blocks, context // 3, text_encoder, guidance)
