"""Finding the model's files in ComfyUI's folders, and loading them through ComfyUI's own loaders."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Any

import comfy.sd
import comfy.text_encoders.flux
import comfy.utils
import folder_paths
import torch

from ..klein.convert import diffusers_to_bfl
from ..weights.architecture import TEXT_LAYERS, TINY
from ..weights.components import WANTED
from ..weights.files import weight_files
from ..weights.identify import Identity
from .common import is_inside

DIFFUSERS = "diffusers"
TEXT_PREFIX = "model."  # of a Qwen3 as ComfyUI knows it
WEIGHT_DTYPES = {  # ComfyUI's UNETLoader
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def choices(kind: str) -> list[str]:
    """What a combo offers: the files of ComfyUI's folder, then ``diffusers/<folder>/<kind>``; perhaps none."""
    return [*folder_paths.get_filename_list(WANTED[kind].folder), *_diffusers_parts(kind)]


def find(kind: str, name: str) -> Path | None:
    """The path of a choice; None where it does not exist (any more) or would leave its folder."""
    if not is_inside(name):
        return None
    file = folder_paths.get_full_path(WANTED[kind].folder, name)
    if file:
        return Path(file)
    first, *parts = PureWindowsPath(name).parts  # which takes both kinds of slashes apart
    if first != DIFFUSERS:
        return None
    folders = (Path(root, *parts) for root in folder_paths.get_folder_paths(DIFFUSERS))
    return next((folder for folder in folders if folder.is_dir()), None)


def load_transformer(path: Path, identity: Identity, weight_dtype: str, disable_dynamic: bool = False) -> Any:
    """MODEL. What ComfyUI's own loader reads goes through it; other names and folders are renamed first."""
    options = WEIGHT_DTYPES[weight_dtype]
    if path.is_file() and identity.layout == "bfl":
        return comfy.sd.load_diffusion_model(str(path), options, **_asked(disable_dynamic))
    state = _read(path, {identity.prefix: ""})
    if identity.layout == "diffusers":
        state = diffusers_to_bfl(state)
    model = comfy.sd.load_diffusion_model_state_dict(state, options, **_asked(disable_dynamic))
    model.cached_patcher_init = (load_transformer, (path, identity, weight_dtype))
    return model


def load_text_encoder(path: Path, identity: Identity, device: str, disable_dynamic: bool = False) -> Any:
    """CLIP."""
    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    embeddings = folder_paths.get_folder_paths("embeddings")
    state = _read(path, {identity.prefix: TEXT_PREFIX})
    if identity.tiny:
        clip = _tiny_clip(state, embeddings, options)
    else:
        clip = comfy.sd.load_text_encoder_state_dicts(
            [state], embeddings, comfy.sd.CLIPType.FLUX2, options, **_asked(disable_dynamic)
        )
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, (path, identity, device))
    return clip


def load_vae(path: Path, identity: Identity) -> Any:
    """VAE."""
    state = _read(path, {identity.prefix: ""})
    vae = _tiny_vae(state) if identity.tiny else comfy.sd.VAE(sd=state)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (_vae_patcher, (path, identity))
    return vae


def _diffusers_parts(kind: str) -> list[str]:
    return sorted(
        f"{DIFFUSERS}/{index.parent.relative_to(root).as_posix()}/{kind}"
        for root in folder_paths.get_folder_paths(DIFFUSERS)
        for pattern in ("*/model_index.json", "*/*/model_index.json")
        for index in Path(root).glob(pattern)
        if (index.parent / kind).is_dir()
    )


def _read(path: Path, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of every shard of a folder, with prefixes as ComfyUI has them."""
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        found, metadata = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
        state |= comfy.utils.convert_old_quants(found, metadata=metadata)[0]
    return comfy.utils.state_dict_prefix_replace(state, prefixes)


def _asked(disable_dynamic: bool) -> dict[str, bool]:
    """ComfyUI before 0.16 does not know the argument, and never asks for it."""
    return {"disable_dynamic": True} if disable_dynamic else {}


def _text_encoder_patcher(path: Path, identity: Identity, device: str, disable_dynamic: bool = False) -> Any:
    return load_text_encoder(path, identity, device, disable_dynamic).patcher


def _vae_patcher(path: Path, identity: Identity, disable_dynamic: bool = False) -> Any:
    return load_vae(path, identity).patcher


def _tiny_clip(state: dict[str, torch.Tensor], embeddings: list[str], options: dict[str, Any]) -> Any:
    """ComfyUI recognises a Qwen3-8B by its width, so the tiny one is built by hand, from the same classes."""

    class Target:
        params: dict[str, Any] = {}  # noqa: RUF012
        clip = comfy.text_encoders.flux.klein_te(
            model_type="qwen3_8b", **{**comfy.sd.llama_detect([state]), "dtype_llama": torch.float32}
        )
        tokenizer = comfy.text_encoders.flux.KleinTokenizer8B

    config = {
        "vocab_size": state["model.embed_tokens.weight"].shape[0],
        "hidden_size": TINY.text_width,
        "intermediate_size": 2 * TINY.text_width,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    options = {**options, "qwen3_8b_model_config": config, "dtype": torch.float32}
    return comfy.sd.CLIP(Target, embedding_directory=embeddings, state_dict=[state], model_options=options)


def _tiny_vae(state: dict[str, torch.Tensor]) -> Any:
    """FLUX.2's VAE at width 32; ComfyUI takes its width only from a config."""
    import comfy.diffusers_convert

    if "decoder.up_blocks.0.resnets.0.norm1.weight" in state:
        state = comfy.diffusers_convert.convert_vae_state_dict(state)
    width = {
        "double_z": True,
        "z_channels": 32,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        "batch_norm_latent": True,
    }
    vae = comfy.sd.VAE(sd=state, config={"params": {"ddconfig": width, "embed_dim": 32}})
    vae.downscale_ratio = vae.upscale_ratio = 16
    vae.latent_channels = 128
    return vae
