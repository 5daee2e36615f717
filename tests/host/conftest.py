"""A ComfyUI server with this pack and tiny klein files, for the whole session; skipped where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from comfy_host import ROOT, Server
from klein_cns.klein import KleinPipeline, tiny
from klein_cns.klein.convert import diffusers_to_bfl
from klein_cns.klein.tiny import CHAT_TEMPLATE
from klein_cns.weights.architecture import TINY_MARK
from klein_cns.weights.components import WANTED
from safetensors.torch import load_file, save_file

QWEN_IDS = 151936  # of ComfyUI's Qwen tokenizer


def pytest_collection_modifyitems(items):
    """Run all tests on ComfyUI in one of the parallel processes, so that they share one server."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("comfyui"))


@pytest.fixture(scope="session")
def host_pipeline(comfyui):
    """The tiny klein with the vocabulary and the tokenizer of ComfyUI."""
    from transformers import Qwen2TokenizerFast

    pipe = tiny()
    table = torch.randn(QWEN_IDS, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    pipe.text_encoder.resize_token_embeddings(QWEN_IDS, mean_resizing=False)
    pipe.text_encoder.model.embed_tokens.weight.data = table
    tokenizer = Qwen2TokenizerFast.from_pretrained(comfyui[0] / "comfy" / "text_encoders" / "qwen25_tokenizer")
    tokenizer.chat_template = CHAT_TEMPLATE
    pipe.register_modules(tokenizer=tokenizer)
    return KleinPipeline(pipe, "tiny")


@pytest.fixture(scope="session")
def server(comfyui, host_pipeline, tmp_path_factory):
    """The running server; its ``base`` holds models, input and output."""
    folder, python = comfyui
    base = tmp_path_factory.mktemp("comfy")
    folders = ("diffusers", "cns_gamma", "loras", *(wanted.folder for wanted in WANTED.values()))
    for name in ("custom_nodes", "input", "output", *(f"models/{one}" for one in folders)):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "klein-cns").symlink_to(ROOT)
    shutil.copy(Path(__file__).parent / "probe_nodes.py", base / "custom_nodes")
    write_models(host_pipeline, base / "models")
    running = Server(folder, python, base)
    yield running
    running.stop()


def write_models(pipeline: KleinPipeline, models: Path) -> None:
    """The tiny klein as single files under the usual names, which the examples ask for, and as a diffusers folder."""
    folder = models / "diffusers" / "tiny-klein"
    pipeline.save_pretrained(folder)
    for kind, wanted in WANTED.items():
        state = load_file(next((folder / kind).glob("*.safetensors")))
        if kind == "transformer":
            state = diffusers_to_bfl(state)
        save_file(state, models / wanted.folder / wanted.sources[0][0], metadata=dict([TINY_MARK]))
