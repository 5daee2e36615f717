"""Nodes of the tests alone, put beside the pack: tensors in and out of a graph without rounding to 8 bits."""

from pathlib import Path

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


class ProbeStack:
    """What a LORA_STACK holds."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "show", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"stack": ("LORA_STACK",)}}

    def show(self, stack):
        return {"ui": {"stack": [list(entry) for entry in stack]}}


class ProbeGive:
    """A LORA_STACK as another pack might make it, from a Python literal."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "give", ("LORA_STACK",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"entries": ("STRING", {})}}

    def give(self, entries):
        return (eval(entries, {"inf": float("inf")}),)  # noqa: S307


NODES = (ProbeSave, ProbeLoad, ProbeCount, ProbeReport, ProbeStack, ProbeGive)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
torch.set_num_threads(2)
