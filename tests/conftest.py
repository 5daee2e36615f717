"""Shared fixtures. Randomised tests take ``seed``, which pytest prints with a failure."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from comfy_host import Server, find_comfyui
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the parallel processes share the cores; threads besides would wait for each other


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Run what shares a ComfyUI server in one of the parallel processes, so that one server is started."""
    for item in items:
        if item.path.parent.name in ("host", "browser") and not {"server", "fresh"}.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group("comfyui"))


@pytest.fixture
def seed(record_property):
    """A fresh seed for each run; set KLEIN_CNS_SEED to repeat one."""
    value = int(os.environ.get("KLEIN_CNS_SEED", random.SystemRandom().randrange(2**31)))
    record_property("seed", value)
    print(f"KLEIN_CNS_SEED={value}")
    return value


@pytest.fixture(scope="session")
def published():
    """The authors' published γ matrices by name; they are an oracle beside the project, not part of it."""
    folder = ROOT.parent / "shared" / "reference" / "gamma"
    if not folder.is_dir():
        pytest.skip("the published gamma matrices are not beside this checkout")
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.fixture(scope="session")
def comfyui():
    """(folder, Python) of ComfyUI."""
    found = find_comfyui()
    if found is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH and COMFYUI_PYTHON, or put one at ~/comfy/ComfyUI with a venv")
    return found


@pytest.fixture(scope="session")
def host_pipeline(comfyui):
    """The tiny klein with the vocabulary and the tokenizer of ComfyUI."""
    from comfy_base import tiny_pipeline

    return tiny_pipeline(comfyui[0])


@pytest.fixture(scope="session")
def server(comfyui, host_pipeline, tmp_path_factory):
    """A ComfyUI with this pack and the files of the tiny klein; its ``base`` holds models, input and output."""
    from comfy_base import make_base, write_models

    base = tmp_path_factory.mktemp("comfy")
    make_base(base, "klein-cns")
    write_models(host_pipeline, base / "models")
    running = Server(*comfyui, base)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def fresh(comfyui, tmp_path_factory):
    """A ComfyUI as a newcomer has it: without model files. The clone's folder has a name of its own."""
    from comfy_base import make_base

    base = tmp_path_factory.mktemp("fresh")
    make_base(base, "klein_cns-main(2)")
    running = Server(*comfyui, base)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def models():
    """Tensors of real models as (dtype, shape), by name of the model."""
    from headers import real_models

    return real_models()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A real photograph, 451 x 300."""
    from skimage import data

    return Image.fromarray(data.chelsea())


@pytest.fixture(scope="session")
def pipeline():
    """A `KleinPipeline` of tiny random weights."""
    from klein_cns.klein import KleinPipeline

    return KleinPipeline.from_pretrained("tiny", device="cpu")


@pytest.fixture
def klein(capsys):
    """Run the command ``klein-cns``; (exit status, stdout, stderr)."""
    from klein_cns import cli

    def run(*args):
        status = cli.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run
