"""klein on the diffusers host: text to image, and editing one to four pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..endpoint import MAX_IMAGES
from ..lora import LoraSpec, Report, parse_loras
from ..lora.read import find_weights, stamp
from ..sampler.acceleration import Accelerator, plan
from ..sampler.noise import checked_batch_index
from ..sampler.params import GAMMA_FILE
from ..sampler.progress import ProgressMatrix, find_progress, reference_progress, resolve_progress
from .denoiser import denoise, guided_velocity, initial_noise
from .loading import load_components
from .memory import memory_advice
from .prompts import encode_prompt
from .references import load_picture, prepare_reference, to_pixels
from .request import KleinRequest
from .result import KleinResult
from .schedules import SCHEDULES
from .sizes import latent_size, output_size

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline

PATCH_SIZE = 2
# Reported beside the request in `KleinResult.parameters`; they describe a run and do not belong to a request.
REPORTED = ("images", "model", "torch_dtype", "device", "batch_index")


def check_inputs(
    request: KleinRequest, images: Sequence[str | Path | Image.Image], progress: ProgressMatrix | None
) -> tuple[list[Tensor], tuple[int, int]]:
    """Check all of the inputs that can be checked before a model is loaded.

    >>> check_inputs(KleinRequest("a red coat", image_size="square"), [], None)
    ([], (512, 512))

    Args:
        request: says what to make.
        images: at most four files, ``data:`` URIs or PIL pictures.
        progress: γ to use in place of the shipped matrix.

    Returns:
        the pictures as pixels, and the (width, height) to make.

    Raises:
        ValueError: there are too many pictures, one is unreadable, or there is no size or no source for γ.
    """
    if isinstance(images, (bytes, Mapping)) or not isinstance(images, Sequence):
        raise ValueError(f"images is a {type(images).__name__}; give a list of pictures.")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"{len(images)} pictures were given; at most {MAX_IMAGES} are allowed. Leave some out.")
    pictures = [to_pixels(load_picture(image)) for image in images]
    if request.cns.enable_cns and request.cns.gamma_source == "reference" and progress is not None:
        raise ValueError(
            "cns_gamma_source is 'reference', yet a progress matrix was given; leave the matrix out or choose 'matrix'."
        )
    if request.cns.enable_cns and not (request.cns.gamma_source == "reference" and pictures):
        resolve_progress(request.cns, progress)
    first = (pictures[0].shape[-1], pictures[0].shape[-2]) if pictures else None
    return pictures, output_size(request.image_size, first)


class KleinPipeline:
    """FLUX.2 [klein] through diffusers, with Colored Noise Sampling and the endpoint's controls.

    Without CNS the latents are those of ``Flux2KleinPipeline``, bit for bit in float32. Unlike it: any
    negative prompt, guidance of 1 and below by the usual formula, prompts of any length, sizes that need not
    be multiples of 16, latents and timesteps in float32 whatever the model's dtype. A call takes the fields of a
    `KleinRequest` by name::

        pipe = KleinPipeline.from_pretrained("black-forest-labs/FLUX.2-klein-base-9B")
        pipe("make the coat red", ["photo.png"], seed=7).save("edited.png")

    Args:
        pipe: holds the components; klein's schedules take the place of its scheduler.
        model: names the model in the parameters of a result.
    """

    def __init__(self, pipe: Flux2KleinPipeline, model: str = "") -> None:
        self.pipe = pipe
        self.model = model
        self.loras: list[LoraSpec] = []
        self.lora_reports: list[Report] = []  # of `loras`: format, base, how much of each applies and how
        self._lora_stamps: list[tuple[object, ...]] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        cpu_offload: bool = False,
    ) -> KleinPipeline:
        """Load a diffusers folder, a Hub id, or ``tiny``.

        Args:
            model: names a diffusers folder or a Hub id; ``tiny`` makes random weights.
            torch_dtype: holds the weights; None takes bfloat16 on an accelerator and float32 on the CPU.
            device: runs the model; None takes the accelerator if there is one, else the CPU.
            cpu_offload: keeps each component in main memory while it is not in use.

        Raises:
            ValueError: the model is missing, is no klein, or is made of parts that do not fit.
        """
        pipe = load_components(model, torch_dtype, device, cpu_offload)
        return cls(pipe, model if model.count("/") == 1 and not Path(model).exists() else Path(model).name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a diffusers folder that `from_pretrained` reads: ``pipe.save_pretrained("klein")``.

        Raises:
            ValueError: LoRAs are loaded, which would be written into the weights.
        """
        if self.loras:
            names = ", ".join(Path(lora.path).name for lora in self.loras)
            raise ValueError(f"LoRAs are loaded ({names}); take them off with set_loras([]), save, and set them again.")
        self.pipe.save_pretrained(folder)

    def set_loras(self, loras: Sequence[Any]) -> None:
        """Replace the LoRAs: at most three of ``PATH:SCALE``, (path, scale) or ``{"path", "scale"}``.

        A path is a .safetensors file or a peft folder, in any format that `lora` reads::

            pipe.set_loras(["style.safetensors:0.8"])

        Raises:
            ValueError: there are too many, a file is missing, or one does not apply exactly.
        """
        from ..lora.peft_host import set_loras

        specs = parse_loras(loras)
        stamps = [stamp(find_weights(spec.path)) for spec in specs]  # a LoRA trained on has another under its name
        if (specs, stamps) != (self.loras, self._lora_stamps):
            self.loras, self.lora_reports, self._lora_stamps = [], [], []
            self.lora_reports = set_loras(self.pipe, specs)
            self.loras, self._lora_stamps = specs, stamps

    def __call__(
        self,
        prompt: str,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        progress: ProgressMatrix | None = None,
        batch_index: Sequence[int] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        show_progress: bool = False,
        **request: Any,
    ) -> KleinResult:
        """`run` with the fields of a `KleinRequest` given by name, the ``cns_*`` too, or as ``cns=CNSParams(...)``.

        ``cns_gamma_file`` names a shipped matrix or a file, where no ``progress`` is given.
        """
        gamma_file = request.pop(GAMMA_FILE, None)
        fields = {"prompt": prompt, **request}
        made = KleinRequest(**fields) if "cns" in fields else KleinRequest.from_dict(fields)
        if gamma_file is not None and progress is None and made.cns.takes_matrix:
            progress = find_progress(gamma_file)
        return self.run(
            made,
            images,
            progress=progress,
            batch_index=batch_index,
            callback=callback,
            show_progress=show_progress,
        )

    @torch.no_grad()
    def run(
        self,
        request: KleinRequest,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        progress: ProgressMatrix | None = None,
        batch_index: Sequence[int] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        show_progress: bool = False,
    ) -> KleinResult:
        """Make pictures from a prompt, or edit up to four pictures by it.

        Usage: ``pipe.run(KleinRequest("make the coat red", seed=7), ["photo.png"]).save("edited.png")``.

        Args:
            request: says what to make.
            images: at most four files, ``data:`` URIs or PIL pictures, in the order that the prompt counts them.
            progress: γ to use; None takes the shipped unguided matrix, or the pictures' own where the request says so.
            batch_index: says which noise of a batch each picture draws; None counts from 0 to num_images - 1.
            callback: takes ``{"x", "i", "sigma", "denoised"}`` before each step, with latents [B, 128, h, w].
            show_progress: draws a progress bar on stderr.

        Returns:
            the pictures, their latents, and the parameters that made them.

        Raises:
            ValueError: a value, a picture or a combination is not allowed; the message names it and what to do.
            torch.cuda.OutOfMemoryError: memory ran out; the message says what to lower.
        """
        images = [images] if isinstance(images, (str, Path, Image.Image)) else images
        pictures, (width, height) = check_inputs(request, images, progress)
        batch_index = checked_batch_index(batch_index, request.num_images)
        clock = _Clock()
        try:
            with memory_advice(_what_to_lower(request, (width, height), len(pictures))):
                latents = self._sample(
                    request, pictures, latent_size(width, height), batch_index, progress, clock, callback, show_progress
                )
                with clock("decode"):
                    pixels = self._decode(latents)[..., :height, :width]
        finally:
            self.pipe.maybe_free_model_hooks()
        if not bool(pixels.isfinite().all()):
            raise ValueError(
                "the result holds NaN or infinite values; lower the scale of the LoRAs "
                f"({', '.join(f'{Path(lora.path).name} {lora.scale:g}' for lora in self.loras) or 'none is loaded'}) "
                f"or load the model in another torch_dtype than {self.pipe.transformer.dtype}."
            )
        return KleinResult(
            pixels=pixels.float().cpu(),
            latents=latents.cpu(),
            seed=request.seed,
            timings=clock.seconds,
            parameters={
                **request.to_dict(),
                **({GAMMA_FILE: progress.name} if progress is not None else {}),
                "image_size": {"width": width, "height": height},
                "images": [_name_of(image) for image in images],
                "loras": [{"path": Path(lora.path).name, "scale": lora.scale} for lora in self.loras],
                "model": self.model,
                "torch_dtype": str(self.pipe.transformer.dtype).removeprefix("torch."),
                "device": self._device.type,
                "batch_index": batch_index,
            },
        )

    def _sample(
        self,
        request: KleinRequest,
        pictures: list[Tensor],
        size: tuple[int, int],
        batch_index: list[int],
        progress: ProgressMatrix | None,
        clock: _Clock,
        callback: Callable[[dict[str, Any]], None] | None,
        show_progress: bool,
    ) -> Tensor:
        """Latents [B, 128, h, w], normalised, of ``size`` (h, w)."""
        with clock("text"):
            positive = encode_prompt(self.pipe, request.prompt)
            negative = encode_prompt(self.pipe, request.negative_prompt) if request.guidance_scale != 1 else None
        with clock("references"):
            references = [self._encode(picture, request.reference_megapixels) for picture in pictures]
        with clock("denoise"):
            scheduler = self._scheduler(request, size, batch_index, self._progress(request, progress, references))
            accelerator = None
            if request.acceleration != "none":
                decided = plan(request.acceleration, scheduler.sigmas, request.guidance_scale, request.solver)
                accelerator = Accelerator(decided)
            velocity = guided_velocity(
                self.pipe, request.num_images, size, positive, negative, references, request.guidance_scale, accelerator
            )
            shape = (self.pipe.transformer.config.in_channels, *size)
            latents = initial_noise(request.seed, batch_index, shape).to(self._device)
            return denoise(scheduler, velocity, latents, callback, show_progress, accelerator)

    @property
    def _device(self) -> torch.device:
        return self.pipe._execution_device

    def _encode(self, picture: Tensor, megapixels: float) -> Tensor:
        """Reference latents [1, 128, h, w], normalised."""
        pixels = prepare_reference(picture, megapixels) * 2 - 1
        return self.pipe._encode_vae_image(pixels.to(self._device, self.pipe.vae.dtype), generator=None)

    def _decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, 16h, 16w] in [0, 1]."""
        vae = self.pipe.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents)
        grid = self.pipe._unpatchify_latents(latents * std + mean)
        decoded = [vae.decode(image[None].to(vae.dtype), return_dict=False)[0] for image in grid]
        return (torch.cat(decoded).float() / 2 + 0.5).clamp(0, 1)

    def _progress(
        self, request: KleinRequest, progress: ProgressMatrix | None, references: list[Tensor]
    ) -> ProgressMatrix | None:
        cns = request.cns
        if progress is None and cns.enable_cns and cns.gamma_source == "reference" and references:
            return reference_progress(references, PATCH_SIZE, cns.num_freq_bins)
        return progress

    def _scheduler(
        self, request: KleinRequest, size: tuple[int, int], batch_index: list[int], progress: ProgressMatrix | None
    ) -> Any:
        from ..sampler.scheduler import FlowMatchCNSScheduler

        scheduler = FlowMatchCNSScheduler.from_config(
            self.pipe.scheduler.config, patch_size=PATCH_SIZE, solver=request.solver, **request.cns.to_request()
        )
        sigmas = SCHEDULES[request.scheduler](request.num_inference_steps, size[0] * size[1])
        scheduler.set_sigmas(sigmas, device=self._device)
        scheduler.set_run(request.seed, size, batch_index, progress)
        scheduler.set_begin_index(0)
        return scheduler


def _what_to_lower(request: KleinRequest, size: tuple[int, int], pictures: int) -> str:
    """What of a request costs memory, with its values."""
    costs = [f"image_size ({size[0]}x{size[1]})"]
    if request.num_images > 1:
        costs.append(f"num_images ({request.num_images})")
    if pictures:
        costs.append(f"reference_megapixels ({request.reference_megapixels:g}) or the number of pictures ({pictures})")
    return f"lower {', '.join(costs)}, or load the model with cpu_offload (--cpu-offload)"


def _name_of(image: str | Path | Image.Image) -> str:
    """A file's name; ``picture`` for what has none."""
    if isinstance(image, Image.Image) or str(image).startswith("data:"):
        return "picture"
    return Path(image).name


@dataclass
class _Clock:
    """Seconds of each stage; ``with clock("text"): ...``."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start
