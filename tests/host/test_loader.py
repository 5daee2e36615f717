"""What the loader takes and refuses, on a real ComfyUI server."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from comfy_graph import FOLDER, SINGLE, failure, latents, node, result
from headers import WRONG, assert_advises, write
from klein_cns.weights.architecture import TINY_MARK
from klein_cns.weights.components import WANTED
from safetensors.torch import load_file, save_file

TINY = dict([TINY_MARK])
INPUTS = {"transformer": "diffusion_model", "text_encoder": "text_encoder", "vae": "vae"}


def place(server, kind, name):
    return server.base / "models" / WANTED[kind].folder / name


def one_step(name, **loader):
    return latents(name, loader={**SINGLE, **loader}, sampler={"steps": 1})


@pytest.fixture(scope="module")
def plain(server):
    """What the single files make in one step."""
    return result(server, one_step("plain"))


@pytest.mark.parametrize(("kind", "model", "words"), WRONG)
def test_a_wrong_file_is_refused_before_it_is_loaded(server, models, kind, model, words):
    path = write(place(server, kind, "wrong.safetensors"), models[model])
    sentence = failure(server, one_step("wrong", **{INPUTS[kind]: path.name})).removeprefix("ValueError: ").strip()
    path.unlink()
    assert sentence.startswith(f"wrong.safetensors is {words}; needed is ")
    assert_advises(sentence, kind)


def test_a_truncated_file_is_refused(server, models):
    path = write(place(server, "transformer", "cut.safetensors"), models["9B"], cut=1000)
    sentence = failure(server, one_step("cut", diffusion_model=path.name))
    path.unlink()
    assert "cut.safetensors is truncated" in sentence and "download" not in sentence.split("needed is")[0]
    assert_advises(sentence.strip(), "transformer")


def test_a_missing_file_does_not_stop_another_branch(server, plain):
    """The loader of a branch that nothing asks for may name files that do not exist."""
    prompt = one_step("branch") | {"other": node("KleinBaseLoader", **one_step("x")["loader"]["inputs"])}
    prompt["other"]["inputs"] |= {"diffusion_model": "gone.safetensors"}
    assert torch.equal(result(server, prompt), plain)


@pytest.mark.parametrize("kind", ["transformer", "text_encoder", "vae"])
def test_a_prefix_changes_nothing(server, plain, kind):
    """As checkpoints carry it, and for the text encoder as a bare Qwen3 is saved, without any."""
    state = load_file(place(server, kind, SINGLE[INPUTS[kind]]))
    if kind == "text_encoder":
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    else:
        prefix = {"transformer": "model.diffusion_model.", "vae": "first_stage_model."}[kind]
        state = {prefix + name: tensor for name, tensor in state.items()}
    path = place(server, kind, "prefixed.safetensors")
    save_file(state, path, metadata=TINY)
    assert torch.equal(result(server, one_step("prefixed", **{INPUTS[kind]: path.name})), plain)


def test_a_prefixed_transformer_in_diffusers_layout(server, plain):
    folder = server.base / "models" / "diffusers" / "tiny-klein" / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    path = place(server, "transformer", "prefixed_diffusers.safetensors")
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, path, metadata=TINY)
    assert torch.equal(result(server, one_step("layout", diffusion_model=path.name)), plain)


def test_a_sharded_transformer(server, host_pipeline, plain):
    folder = server.base / "models" / "diffusers" / "sharded"
    host_pipeline.pipe.save_pretrained(folder, max_shard_size="2MB")
    for path in folder.glob("*/*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", **TINY})
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    parts = {name: value.replace("tiny-klein", "sharded") for name, value in FOLDER.items()}
    assert torch.allclose(result(server, one_step("sharded", **parts)), plain, atol=1e-5, rtol=0)


def test_a_linked_folder_and_a_folder_called_diffusers(server, plain):
    """Weights kept on another disk; and a folder of ComfyUI's own that has the name of ours."""
    models = server.base / "models"
    (server.base / "elsewhere").mkdir()
    (models / "diffusers" / "tiny-klein").rename(server.base / "elsewhere" / "tiny-klein")
    (models / "diffusers" / "tiny-klein").symlink_to(server.base / "elsewhere" / "tiny-klein")
    assert torch.allclose(result(server, one_step("linked", **FOLDER)), plain, atol=1e-5, rtol=0)
    own = place(server, "transformer", "diffusers/own.safetensors")
    own.parent.mkdir()
    os.link(place(server, "transformer", SINGLE["diffusion_model"]), own)
    assert torch.equal(result(server, one_step("own", diffusion_model="diffusers/own.safetensors")), plain)


def test_a_distilled_file_loads_with_a_warning(server, plain):
    path = place(server, "transformer", "flux-2-klein-9b.safetensors")
    os.link(place(server, "transformer", SINGLE["diffusion_model"]), path)
    prompt = one_step("distilled", diffusion_model=path.name)
    first = server.watch(prompt).entry["outputs"]["loader"]["text"]
    assert any("is the distilled klein, made for 4 steps at cfg 1, not Base" in text for text in first)
    assert any(text.startswith("random test weights, the picture will be noise: ") for text in first)
    prompt["sample"]["inputs"]["seed"] = 6  # the loader's outputs then come from the cache
    outputs = server.watch(prompt).entry["outputs"]
    if server.version > (0, 11):  # the history of 0.11 leaves cached nodes out
        assert outputs["loader"]["text"] == first
    assert torch.equal(result(server, one_step("distilled", diffusion_model=path.name)), plain)


def test_a_list_holds_what_is_there(server, fresh):
    """Even nothing, with the usual file as the default: so the frontend sees that it is missing."""
    for where in (fresh, server):
        inputs = where.get("/object_info/KleinBaseLoader")["KleinBaseLoader"]["input"]["required"]
        for kind, wanted in WANTED.items():
            files = {path.name for path in (where.base / "models" / wanted.folder).iterdir() if path.is_file()}
            options = {name for name in inputs[INPUTS[kind]][1]["options"] if "/" not in name}
            assert options == files and inputs[INPUTS[kind]][1]["default"] == wanted.sources[0][0]


def test_the_default_is_a_usual_file_that_is_there(fresh):
    """Of the two VAEs that are published, the one that is there."""
    second = WANTED["vae"].sources[1][0]
    file = fresh.base / "models" / "vae" / second
    file.write_bytes(b"")
    time.sleep(1)  # ComfyUI keeps a list for half a second
    info = fresh.get("/object_info/KleinBaseLoader")["KleinBaseLoader"]["input"]["required"]["vae"][1]
    file.unlink()
    assert (info["options"], info["default"]) == ([second], second)


def test_without_any_file_the_run_says_what_to_get(fresh):
    text = failure(fresh, one_step("nothing"))
    for kind in WANTED:
        assert_advises(next(line for line in text.splitlines() if SINGLE[INPUTS[kind]] in line), kind)


@pytest.fixture(scope="module")
def quantised(server, comfyui):
    """The tiny klein in each quantised format, made by ComfyUI's own code, and dequantised again."""
    folder, python = comfyui
    sources = [place(server, kind, SINGLE[INPUTS[kind]]) for kind in ("transformer", "text_encoder")]
    script = Path(__file__).parent / "quantise.py"
    done = subprocess.run([python, script, folder, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["fp8", "scaled fp8", "fp8 mixed", "nvfp4"])
@pytest.mark.parametrize("kind", ["transformer", "text_encoder"])
def test_quantised_files(server, quantised, plain, kind, form):
    """As ComfyUI's own loader reads the file, and near the same weights dequantised."""
    found = result(server, one_step("quantised", **{INPUTS[kind]: f"{form}.safetensors"}))
    near = result(server, one_step("exact", **{INPUTS[kind]: f"{form} exact.safetensors"}))
    assert not torch.equal(found, plain)
    assert float((found - near).norm()) < 0.1 * float((found - plain).norm())
    if kind == "transformer":
        prompt = one_step("theirs")
        prompt["unet"] = node("UNETLoader", unet_name=f"{form}.safetensors", weight_dtype="default")
        prompt["sample"]["inputs"]["model"] = ["unet", 0]
        assert torch.equal(found, result(server, prompt))


def test_comfyui_can_load_it_again(server, plain):
    """What ComfyUI does for a second GPU or a plain copy: the loader's own factory, from a file and from a folder."""
    if server.version <= (0, 11):
        pytest.skip("ComfyUI 0.11 makes no deep copies of a model")
    for name, loader in (("file", SINGLE), ("folder", FOLDER)):
        prompt = one_step("again", **loader)
        prompt["again"] = node("ProbeReload", model=["loader", 0], clip=["loader", 1], vae=["loader", 2])
        prompt["sample"]["inputs"]["model"] = prompt["edit"]["inputs"]["vae"] = ["again", 0]
        prompt["edit"]["inputs"] |= {"clip": ["again", 1], "vae": ["again", 2]}
        assert torch.allclose(result(server, prompt), plain, atol=1e-5, rtol=0), name


def test_weight_dtype_and_the_text_encoder_on_the_cpu(server, plain):
    prompt = one_step("dtype", weight_dtype="fp8_e4m3fn", text_encoder_device="cpu")
    found = result(server, prompt)
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.2


@pytest.mark.parametrize("name", ["diffusers/C:/tiny/transformer", "diffusers/tiny-klein/../C:/tiny/transformer"])
def test_a_drive_in_a_name_does_not_leave_the_folder(server, name):
    """On Windows ``C:`` in the middle of a path starts it again; here a folder of that name stands for the drive."""
    drive = server.base / "models" / "diffusers" / "C:"
    drive.mkdir(exist_ok=True)
    if not (drive / "tiny").exists():
        (drive / "tiny").symlink_to(server.base / "models" / "diffusers" / "tiny-klein")
    assert f"{name!r} does not exist" in failure(server, one_step("drive", diffusion_model=name))
