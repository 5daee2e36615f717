"""The transformer as a denoiser: guided velocity at a timestep, and the loop over a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..sampler.acceleration import Accelerator

Text = tuple[Tensor, Tensor]  # prompt embeddings [1, L, D] and their position ids [1, L, 4]
Velocity = Callable[[Tensor, Tensor], Tensor]


def initial_noise(seed: int, batch_index: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """ComfyUI's noise for that seed (``comfy.sample.prepare_noise``): image i is the i-th draw of one CPU stream.

    >>> initial_noise(7, [0, 1], (128, 4, 4)).shape
    torch.Size([2, 128, 4, 4])

    Args:
        seed: starts the stream, 0 to 2^64 - 1.
        batch_index: says which draw each image takes.
        shape: gives the size of one image, [C, h, w].

    Returns:
        float32 [B, C, h, w].
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = [torch.randn(shape, generator=generator, device="cpu") for _ in range(max(batch_index) + 1)]
    return torch.stack([draws[i] for i in batch_index])


def guided_velocity(
    pipe: Any,
    batch: int,
    size: tuple[int, int],
    positive: Text,
    negative: Text | None,
    references: list[Tensor],
    guidance_scale: float,
    accelerator: Accelerator | None = None,
) -> Velocity:
    """The model as a function that `denoise` calls.

    It takes the operations of ``Flux2KleinPipeline``, so that both give the same bits. Guidance follows the usual
    formula at any scale.

    Args:
        pipe: a ``Flux2KleinPipeline`` whose transformer is called.
        batch: counts the images, B.
        size: gives (h, w) of the latents.
        positive: embeds the prompt, as `encode_prompt` does.
        negative: embeds the negative prompt; None where guidance_scale is 1.
        references: hold the normalised latents [1, C, h, w] of each picture, of any sizes.
        guidance_scale: weighs the prompt against the negative one.
        accelerator: gives the unconditional velocity where it is not computed; give `denoise` the same.

    Returns:
        ``(latents [B, C, h, w], timestep) -> velocity [B, C, h, w]``, both in float32.
    """
    transformer, device = pipe.transformer, pipe._execution_device
    ids = pipe._prepare_latent_ids(torch.empty(batch, 1, *size, device="cpu")).to(device)
    context = torch.empty(batch, 0, transformer.config.in_channels, device=device)
    if references:
        context = torch.cat([pipe._pack_latents(latent) for latent in references], dim=1).repeat(batch, 1, 1)
        ids = torch.cat([ids, pipe._prepare_image_ids(references).repeat(batch, 1, 1).to(device)], dim=1)

    def predict(tokens: Tensor, timestep: Tensor, text: Text, branch: str) -> Tensor:
        embeds, text_ids = text
        with transformer.cache_context(branch):
            output = transformer(
                hidden_states=torch.cat([tokens, context], dim=1).to(transformer.dtype),
                timestep=timestep,
                guidance=None,
                encoder_hidden_states=embeds.expand(batch, -1, -1),
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
        return output[:, : tokens.shape[1]].float()

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        tokens = pipe._pack_latents(latents)
        timestep = timestep.expand(batch) / 1000
        with _exact_timestep(transformer, timestep * 1000):
            guided = predict(tokens, timestep, positive, "cond")
            if negative is not None:
                predict_unguided = partial(predict, tokens, timestep, negative, "uncond")
                if accelerator is None:
                    unguided = predict_unguided()
                else:  # x0 = x - σ·velocity
                    unguided = accelerator.unconditional(guided, predict_unguided, -timestep[0])
                guided = unguided + guidance_scale * (guided - unguided)
        return guided.transpose(1, 2).unflatten(2, size)

    return velocity


def denoise(
    scheduler: Any,
    velocity: Velocity,
    latents: Tensor,
    callback: Callable[[dict[str, Any]], None] | None = None,
    show_progress: bool = False,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Run a diffusers scheduler to its end.

    Args:
        scheduler: a diffusers scheduler whose sigmas are set.
        velocity: predicts ε - x0, as `guided_velocity` makes it.
        latents: [B, C, h, w] hold the noise at the first sigma.
        callback: takes ``{"x", "i", "sigma", "denoised"}`` before each step.
        show_progress: draws a progress bar on stderr.
        accelerator: decides at which steps the model is called; None calls it at each.

    Returns:
        the latents at the last sigma, [B, C, h, w].
    """
    for i, timestep in enumerate(tqdm(scheduler.timesteps, disable=not show_progress)):
        sigma = scheduler.sigmas[i]
        if accelerator is None:
            output = velocity(latents, timestep)
        else:
            output = (latents - accelerator.x0(i, partial(_x0, velocity, latents, timestep, sigma))) / sigma
        if callback is not None:
            callback({"x": latents, "i": i, "sigma": sigma, "denoised": latents - sigma * output})
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def _x0(velocity: Velocity, latents: Tensor, timestep: Tensor, sigma: Tensor) -> Tensor:
    return latents - sigma * velocity(latents, timestep)


@contextmanager
def _exact_timestep(transformer: Any, timestep: Tensor) -> Iterator[None]:
    """Embed the float32 timestep: the transformer rounds it to its own dtype, in bfloat16 by up to 2 of 1000."""
    time_proj = transformer.time_guidance_embed.time_proj
    hook = time_proj.register_forward_pre_hook(lambda module, args: (timestep, *args[1:]))
    try:
        yield
    finally:
        hook.remove()
