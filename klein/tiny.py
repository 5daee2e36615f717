"""A complete klein of random weights, a few MB: the real classes, code paths and file layout, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..weights.architecture import COMPONENTS, TEXT_LAYERS, TINY, TINY_MARK

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny(seed: int = 0) -> Flux2KleinPipeline:
    """A ``Flux2KleinPipeline`` of random weights (float32, on the CPU); it makes noise, not pictures.

    2 double and 3 single blocks of width 128, a 28-layer Qwen3 of width 32, FLUX.2's VAE at width 32, a
    byte-level tokenizer with klein's chat template. Saves as a diffusers folder whose safetensors metadata
    says ``klein_cns: tiny``. Does not touch the global generators: ``tiny().save_pretrained("klein")``.

    Args:
        seed: starts the weights, 0 to 2^64 - 1.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        transformer = Flux2Transformer2DModel(
            num_layers=TINY.double_blocks,
            num_single_layers=TINY.single_blocks,
            num_attention_heads=TINY.hidden // 128,
            joint_attention_dim=TINY.context,
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(block_out_channels=(32,) * 4, layers_per_block=1)
        tokenizer = _byte_tokenizer()
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TINY.text_width,
                intermediate_size=2 * TINY.text_width,
                num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=128,
                max_position_embeddings=40960,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    generator = torch.Generator().manual_seed(seed)
    for model in (transformer, vae, text_encoder):
        _fill(model.eval().requires_grad_(False), generator)
    vae.bn.running_mean.normal_(0.0, 0.1, generator=generator)
    vae.bn.running_var.uniform_(0.5, 1.5, generator=generator)
    return _tiny_class()(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def is_tiny(folder: Path) -> bool:
    """Whether the transformer of a diffusers folder carries the mark of a tiny klein."""
    from safetensors import SafetensorError, safe_open

    files = sorted((folder / "transformer").glob("*.safetensors"))
    if not files:
        return False
    try:
        with safe_open(files[0], framework="pt") as file:
            return (file.metadata() or {}).get(TINY_MARK[0]) == TINY_MARK[1]
    except SafetensorError:
        return False  # loading it will say what is wrong


def _tiny_class() -> type:
    from diffusers import Flux2KleinPipeline as Base

    class Flux2KleinPipeline(Base):  # the same name: model_index.json must name the class that diffusers has
        def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, **kwargs)
            _mark(Path(save_directory))

    return Flux2KleinPipeline


def _mark(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in (file for part in COMPONENTS for file in (folder / part).glob("*.safetensors")):
        save_file(load_file(path), path, metadata={"format": "pt", TINY_MARK[0]: TINY_MARK[1]})


def _fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain, norms near 1, small biases, all from ``generator``."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.05, generator=generator)


def _byte_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    alphabet = (*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    return Qwen2TokenizerFast(
        vocab={token: index for index, token in enumerate(alphabet)},
        merges=[],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
    )
