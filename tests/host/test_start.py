"""Starting: nothing heavy is imported, and a broken library takes no node down."""

from __future__ import annotations

import os

import pytest
import torch
from comfy_graph import SINGLE, failure, latents, node, result
from comfy_host import Server
from klein_cns.weights.components import WANTED

LATE = ("diffusers", "peft", "fal_client", "accelerate", "matplotlib", "skimage")


@pytest.fixture(scope="module")
def broken(comfyui, server, tmp_path_factory):
    """A second server, over the same files, whose diffusers, peft and fal-client fail on import."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("diffusers", "peft", "fal_client"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is broken here')\n")
    running = Server(*comfyui, server.base, {"PYTHONPATH": str(folder)})
    yield running
    running.stop()


def test_the_nodes_run_with_broken_libraries(server, broken):
    expected = result(server, latents("whole"))
    assert torch.equal(result(broken, latents("broken")), expected)
    assert "is broken here" not in broken.log.read_text()


def test_starting_imports_nothing_heavy(broken):
    prompt = {"probe": node("ProbeModules", names="\n".join(LATE))}
    assert broken.run(prompt)["outputs"]["probe"]["loaded"] == []


def test_an_error_has_no_path_whatever_the_clone_is_called(server, fresh):
    """The LoRA reader's own error, from a clone whose folder has another name, with the server's files for a while."""
    links = [f"models/{wanted.folder}/{name}" for wanted, name in zip(WANTED.values(), SINGLE.values(), strict=True)]
    for link in links:
        os.link(server.base / link, fresh.base / link)
    (fresh.base / "models" / "loras" / "bad.safetensors").write_bytes(b"\xff" * 64)
    slots = {f"lora_{slot}": "none" for slot in (2, 3)} | {f"strength_{slot}": 1.0 for slot in (1, 2, 3)}
    prompt = latents("renamed")
    prompt["lora"] = node("KleinLoraStack", model=["loader", 0], lora_1="bad.safetensors", apply="auto", **slots)
    prompt["sample"]["inputs"]["model"] = ["lora", 0]
    text = failure(fresh, prompt)
    for link in [*links, "models/loras/bad.safetensors"]:
        (fresh.base / link).unlink()
    assert text.startswith("ValueError: LoRA bad.safetensors is not a safetensors file")
    twice = "ComfyUI's own line and the end of the traceback"
    assert fresh.log.read_text().count("LoRA bad.safetensors is not a safetensors file") == 2, twice
