"""Starting: nothing heavy is imported, and a broken library takes no node down."""

from __future__ import annotations

import pytest
import torch
from comfy_graph import latents, node, result
from comfy_host import Server

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
