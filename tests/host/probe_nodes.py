"""Nodes of the tests alone, put beside the pack: tensors in and out of a graph without rounding to 8 bits."""

import copy
import json
import sys
import time
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models
import folder_paths
import torch
from safetensors.torch import load_file, save_file


class ProbeSave:
    """Write an IMAGE or the samples of a LATENT to ``output/<name>.safetensors``."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "save", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}, "optional": {"image": ("IMAGE",), "latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def save(self, name, image=None, latent=None):
        tensor = image if latent is None else latent["samples"]
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"tensor": tensor.float().cpu().contiguous()}, path)
        return {"ui": {"saved": [name]}}


class ProbeLoad:
    """An IMAGE, MASK or LATENT from ``input/<name>.safetensors``."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "load", ("IMAGE", "MASK", "LATENT")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def load(self, name):
        tensor = load_file(Path(folder_paths.get_input_directory()) / f"{name}.safetensors")["tensor"]
        return tensor, tensor, {"samples": tensor}


class ProbeCount:
    """How often a VAE and a CLIP have encoded since they were loaded; wraps them to count."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "wrap", ("CLIP", "VAE")
    counts = {"text": 0, "picture": 0}  # noqa: RUF012

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",), "vae": ("VAE",)}}

    def wrap(self, clip, vae):
        encode_text, encode_picture = clip.encode_from_tokens_scheduled, vae.encode

        def counted_text(*args, **kwargs):
            self.counts["text"] += 1
            return encode_text(*args, **kwargs)

        def counted_picture(*args, **kwargs):
            self.counts["picture"] += 1
            return encode_picture(*args, **kwargs)

        clip.encode_from_tokens_scheduled, vae.encode = counted_text, counted_picture
        return clip, vae


class ProbeReport:
    """Write the counts after ``after`` has run."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "report", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def report(self, after):
        return {"ui": {"counts": [dict(ProbeCount.counts)]}}


class ProbeReload:
    """MODEL, CLIP and VAE loaded once more through the factory that their loader left for ComfyUI."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "reload", ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}}

    def reload(self, model, clip, vae):
        clip, vae = clip.clone(), copy.copy(vae)
        clip.patcher = clip.patcher.clone(force_deepcopy=True)
        clip.cond_stage_model = clip.patcher.model
        vae.patcher = vae.patcher.clone(force_deepcopy=True)
        vae.first_stage_model = vae.patcher.model
        return model.clone(force_deepcopy=True), clip, vae


class ProbeSlow:
    """MODEL whose every call takes a minute, and checks for an interrupt as ComfyUI's layers do."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "slow", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def slow(self, model):
        def wait(apply, call):
            for _ in range(600):
                comfy.ops.run_every_op()
                time.sleep(0.1)
            return apply(call["input"], call["timestep"], **call["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wait)
        return (model,)


class ProbeNothing:
    """MODEL that predicts x0 = 0 everywhere."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "nothing", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def nothing(self, model):
        model = model.clone()
        model.set_model_unet_function_wrapper(lambda apply, call: torch.zeros_like(call["input"]))
        return (model,)


class ProbeFlux1:
    """A tiny FLUX.1 of random weights, 16 latent channels, and a CONDITIONING for it."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("MODEL", "CONDITIONING")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        shape = {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 8,
            "context_in_dim": 32, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1,
            "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
            "guidance_embed": False, "txt_ids_dims": [],
        }  # fmt: skip
        config = comfy.supported_models.Flux(shape)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        generator = torch.Generator().manual_seed(0)
        for weight in model.diffusion_model.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        device = torch.device("cpu")
        context = torch.randn(1, 4, 32, generator=generator), torch.randn(1, 8, generator=generator)
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
        return patcher, [[context[0], {"pooled_output": context[1]}]]


class ProbeSigmas:
    """Write SIGMAS to ``output/sigmas.safetensors``."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "save", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",)}}

    def save(self, sigmas):
        save_file({"tensor": sigmas.clone()}, Path(folder_paths.get_output_directory()) / "sigmas.safetensors")
        return {}


class ProbeModules:
    """Which of these modules are imported, one name a line."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "look", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"names": ("STRING", {"multiline": True})}}

    def look(self, names):
        return {"ui": {"loaded": [name for name in names.splitlines() if name in sys.modules]}}


class ProbeStack:
    """What a LORA_STACK holds."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "show", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"stack": ("LORA_STACK",)}}

    def show(self, stack):
        return {"ui": {"stack": [list(entry) for entry in stack]}}


class ProbeGive:
    """A LORA_STACK as another pack might make it, from JSON; its lists become tuples."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "give", ("LORA_STACK",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"entries": ("STRING", {})}}

    def give(self, entries):
        stack = json.loads(entries)
        if not isinstance(stack, list):
            return (stack,)
        return ([tuple(entry) if isinstance(entry, list) else entry for entry in stack],)


class ProbeText:
    """A text that any input takes, also a combo, as other packs' switches and pickers give one."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "give", ("*",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def give(self, text):
        return (text,)


class ProbeSpoil:
    """CONDITIONING changed in place: its tensors, its options and its lists."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "spoil", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def spoil(self, conditioning):
        for tensor, options in conditioning:
            tensor.mul_(-1)
            for latent in options.get("reference_latents", []):
                latent.mul_(-1)
            options.get("reference_latents", []).clear()
            options["strength"] = 0.5
        return (conditioning,)


class ProbeHungry:
    """MODEL whose first call asks for more memory than there is."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "starve", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def starve(self, model):
        model = model.clone()
        model.set_model_unet_function_wrapper(lambda apply, call: torch.empty(2**50))
        return (model,)


class ProbeCalls:
    """MODEL that counts its calls since this node ran: one for each picture and conditioning."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "count", ("MODEL",)
    calls = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def count(self, model):
        def counted(apply, call):
            ProbeCalls.calls += len(call["cond_or_uncond"])
            return apply(call["input"], call["timestep"], **call["c"])

        ProbeCalls.calls = 0
        model = model.clone()
        model.set_model_unet_function_wrapper(counted)
        return (model,)


class ProbeCalled(ProbeReport):
    """Report what ProbeCalls has counted after ``after`` has run."""

    def report(self, after):
        return {"ui": {"calls": [ProbeCalls.calls]}}


class ProbeBoth:
    """MODEL with a patch that asks ComfyUI for the unconditional prediction also at cfg 1."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "ask", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def ask(self, model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
        return (model,)


class ProbeStop:
    """SAMPLER without progress bar and preview that is interrupted in the callback of a step; an error says when."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "stop", ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sampler": ("SAMPLER",), "at": ("INT", {})}}

    def stop(self, sampler, at):
        seen = []

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
            def interrupt(event):
                seen.append(event["i"])
                if event["i"] == at:
                    comfy.model_management.interrupt_current_processing()

            try:
                return sampler.sampler_function(model, x, sigmas, extra_args, interrupt, disable, **options)
            except comfy.model_management.InterruptProcessingException:
                raise RuntimeError(f"interrupted after steps {seen}, {ProbeCalls.calls} calls") from None

        return (comfy.samplers.KSAMPLER(sample, sampler.extra_options),)


NODES = (
    ProbeSave, ProbeLoad, ProbeCount, ProbeReport, ProbeReload, ProbeSlow, ProbeNothing, ProbeFlux1, ProbeSigmas,
    ProbeModules, ProbeStack, ProbeGive, ProbeText, ProbeSpoil, ProbeHungry,
    ProbeCalls, ProbeCalled, ProbeBoth, ProbeStop,
)  # fmt: skip
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
torch.set_num_threads(2)
