"""Base folders of a ComfyUI for tests: this pack, the probe nodes, and the files of a tiny klein."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from comfy_host import ROOT, Server
from fal_server import KEY, FalServer
from klein_cns.klein import KleinPipeline, tiny
from klein_cns.klein.convert import diffusers_to_bfl
from klein_cns.klein.tiny import CHAT_TEMPLATE
from klein_cns.weights.architecture import TINY_MARK
from klein_cns.weights.components import WANTED
from safetensors.torch import load_file, save_file

FAL_CLIENT = (  # fal-client and what it needs, for a ComfyUI that has none of it
    "fal_client",
    "httpx",
    "httpcore",
    "h11",
    "anyio",
    "sniffio",
    "certifi",
    "idna",
    "aiofiles",
    "asyncstdlib",
    "httpx_sse",
    "msgpack",
    "websockets",
    "filelock",
    "typing_extensions.py",
)
QWEN_IDS = 151936  # of ComfyUI's Qwen tokenizer


def tiny_pipeline(comfyui: Path) -> KleinPipeline:
    """The tiny klein with the vocabulary and the tokenizer of ComfyUI."""
    from transformers import Qwen2TokenizerFast

    pipe = tiny()
    table = torch.randn(QWEN_IDS, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    pipe.text_encoder.resize_token_embeddings(QWEN_IDS, mean_resizing=False)
    pipe.text_encoder.model.embed_tokens.weight.data = table
    tokenizer = Qwen2TokenizerFast.from_pretrained(comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer")
    tokenizer.chat_template = CHAT_TEMPLATE
    pipe.register_modules(tokenizer=tokenizer)
    return KleinPipeline(pipe, "tiny")


def make_base(base: Path, clone: str) -> None:
    """A base folder for ComfyUI with empty model folders, and this pack in a folder of the name ``clone``."""
    folders = ("diffusers", "cns_gamma", "loras", *(wanted.folder for wanted in WANTED.values()))
    for name in ("custom_nodes", "input", "output", *(f"models/{one}" for one in folders)):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / clone).symlink_to(ROOT)
    shutil.copy(Path(__file__).parent / "host" / "probe_nodes.py", base / "custom_nodes")


def write_models(pipeline: KleinPipeline, models: Path) -> None:
    """The tiny klein as single files under the usual names, which the examples ask for, and as a diffusers folder."""
    folder = models / "diffusers" / "tiny-klein"
    pipeline.save_pretrained(folder)
    for kind, wanted in WANTED.items():
        state = load_file(next((folder / kind).glob("*.safetensors")))
        if kind == "transformer":
            state = diffusers_to_bfl(state)
        save_file(state, models / wanted.folder / wanted.sources[0][0], metadata=dict([TINY_MARK]))


def link_fal_client(base: Path) -> Path:
    """A folder ``packages`` in a base folder with fal-client, to be added to ComfyUI's ``sys.path``."""
    packages = base / "packages"
    packages.mkdir()
    site = Path(importlib.util.find_spec("fal_client").origin).parents[1]
    for name in FAL_CLIENT:
        if (site / name).exists():
            (packages / name).symlink_to(site / name)
    return packages


def serve_examples(comfyui: tuple[Path, Path], base: Path, pipeline: KleinPipeline, fal: FalServer) -> Server:
    """A ComfyUI on which every example runs as it stands: the tiny klein's files, and a fake of fal."""
    make_base(base, "klein-cns")
    write_models(pipeline, base / "models")
    environment = {"KLEIN_CNS_FAL_URL": fal.url, "FAL_KEY": KEY, "PYTHONPATH": str(link_fal_client(base))}
    return Server(*comfyui, base, environment)
