"""Prompt encoding: Qwen3's hidden states 9, 18 and 27, side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_TOKENS = 512


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """Embeddings [1, L, 3 x text width] and position ids [1, L, 4] of a prompt, a negative one as well.

    They are padded to 512 tokens and never cut. diffusers would cut a longer prompt and drop the assistant's turn with
    it; ComfyUI keeps it whole.

    Args:
        pipe: a ``Flux2KleinPipeline`` whose text encoder is called.
        prompt: any text, the empty one too.
    """
    text = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    length = max(MIN_TOKENS, len(pipe.tokenizer(text)["input_ids"]))
    return pipe.encode_prompt(prompt, device=pipe._execution_device, max_sequence_length=length)
