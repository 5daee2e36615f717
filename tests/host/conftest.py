"""A ComfyUI server with this pack and tiny klein files, for the whole session; skipped where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from comfy_host import ROOT, Server
from klein_cns.klein import KleinPipeline, tiny
from klein_cns.klein.convert import diffusers_to_bfl
from klein_cns.klein.tiny import CHAT_TEMPLATE, MARK
from safetensors.torch import load_file, save_file

QWEN_IDS = 151936  # of ComfyUI's Qwen tokenizer


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
    for name in ("custom_nodes", "input", "output", "models/diffusion_models", "models/text_encoders", "models/vae",
                 "models/diffusers", "models/cns_gamma"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "klein nodes").symlink_to(ROOT)
    shutil.copy(Path(__file__).parent / "probe_nodes.py", base / "custom_nodes")
    write_models(host_pipeline, base / "models")
    running = Server(folder, python, base)
    yield running
    running.stop()


def write_models(pipeline: KleinPipeline, models: Path) -> None:
    """The tiny klein as single files and as a diffusers folder."""
    folder = models / "diffusers" / "tiny-klein"
    pipeline.save_pretrained(folder)
    metadata = {MARK[0]: MARK[1]}
    transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(diffusers_to_bfl(transformer), models / "diffusion_models" / "tiny.safetensors", metadata=metadata)
    for part, name in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        target = models / {"text_encoder": "text_encoders", "vae": "vae"}[part] / "tiny.safetensors"
        save_file(load_file(folder / part / f"{name}.safetensors"), target, metadata=metadata)
