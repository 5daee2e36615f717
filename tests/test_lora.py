"""LoRAs through peft: a known change of the weights, and every way a file can fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from klein_cns.klein import KleinPipeline
from klein_cns.lora import LoraSpec, load, parse_loras
from safetensors.torch import load_file, save_file

SMALL = {"num_inference_steps": 2, "seed": 5, "image_size": (64, 64)}
MODULES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_qkv_mlp_proj", "proj_out")


@pytest.fixture(scope="module")
def own():
    """A pipeline whose LoRAs these tests may change."""
    return KleinPipeline.from_pretrained("tiny", device="cpu")


def write_lora(path, pipeline, seed, rank=4, **extra):
    """A LoRA file in diffusers' own names, and the change of each weight that it means."""
    generator = torch.Generator().manual_seed(seed)
    state, delta = {}, {}
    for name in MODULES:
        weight = pipeline.pipe.transformer.get_submodule(name).weight
        a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        delta[name] = b @ a
    save_file({**state, **extra}, path)
    return delta


def test_one_to_three_loras_change_the_weights_by_exactly_their_sum(own, tmp_path):
    scales = (0.7, -1.2, 0.3)
    plain = own("a cat", **SMALL)
    changed = KleinPipeline.from_pretrained("tiny", device="cpu")
    files = []
    for i, scale in enumerate(scales):
        files.append(tmp_path / f"{i}.safetensors")
        for name, delta in write_lora(files[i], changed, seed=i).items():
            changed.pipe.transformer.get_submodule(name).weight.data += scale * delta
        own.set_loras([f"{file}:{scale}" for file, scale in zip(files, scales, strict=False)])
        loaded, merged = own("a cat", **SMALL).latents, changed("a cat", **SMALL).latents
        assert not torch.allclose(loaded, plain.latents, atol=1e-2)
        torch.testing.assert_close(loaded, merged, rtol=1e-4, atol=1e-4)
    assert own("a cat", **SMALL).parameters["loras"][1] == {"path": "1.safetensors", "scale": -1.2}
    own.set_loras([])
    assert torch.equal(own("a cat", **SMALL).latents, plain.latents)


def test_what_a_user_may_write(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    expected = [LoraSpec(str(file), 0.5)]
    for value in (f"{file}:0.5", (file, 0.5), {"path": str(file), "scale": 0.5}, LoraSpec(str(file), 0.5)):
        assert parse_loras([value]) == expected
    assert parse_loras([str(file), {"path": str(file)}]) == [LoraSpec(str(file), 1.0)] * 2
    assert parse_loras([f"{file}:-2"]) == [LoraSpec(str(file), -2.0)]


@pytest.mark.parametrize(
    "path", ["C:/x.safetensors", r"C:\a b\x.safetensors", "c:x.sft", r"\\?\D:\x.sft", r"\\host\share\x.sft"]
)
def test_a_drive_of_windows_is_part_of_the_path(path, monkeypatch):
    """With a scale and without, on every system."""
    monkeypatch.setattr(load, "find_weights", lambda path: path)
    for given in (path, Path(path) if "/" in path else path, {"path": path}):
        assert parse_loras([given]) == [LoraSpec(path, 1.0)]
    for scale in (0.5, -2.0):
        assert parse_loras([f"{path}:{scale}", (path, scale)]) == [LoraSpec(path, scale)] * 2
    with pytest.raises(ValueError, match="'strong' after the colon is not a number"):
        parse_loras([f"{path}:strong"])


def test_a_folder_of_one_letter_may_have_a_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/adapter_model.safetensors").write_bytes(b"")
    assert parse_loras(["a:0.5"]) == [LoraSpec("a", 0.5)]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("missing.safetensors", "LoRA missing.safetensors does not exist"),
        ("missing.safetensors:0.5", "LoRA missing.safetensors does not exist"),
        ("C:/missing.safetensors", "LoRA missing.safetensors does not exist"),
        ("C:/missing.safetensors:0.5", "LoRA missing.safetensors does not exist"),
        ("a.safetensors:strong", "'strong' after the colon is not a number"),
        ("a.safetensors:nan", "scale of LoRA a.safetensors is nan"),
        (("a.safetensors", 10**400), "scale of LoRA a.safetensors is 10+.*; it must be a finite number"),
        ("a" * 300 + ".safetensors:0.5", "LoRA a+.* cannot be read"),
        (("a.safetensors", True), "scale of LoRA a.safetensors is True"),
        (("a.safetensors", "1"), "scale of LoRA a.safetensors is '1'"),
        ({"scale": 1.0}, "must have 'path'"),
        ({"path": "a.safetensors", "weight": 1.0}, "nothing else"),
        ("https://example.com/a.safetensors", "is a web address; download it"),
    ],
)
def test_what_is_wrong_is_said(value, says):
    with pytest.raises(ValueError, match=says):
        parse_loras([value])


def test_four_are_too_many(own, tmp_path):
    file = tmp_path / "a.safetensors"
    write_lora(file, own, seed=1)
    with pytest.raises(ValueError, match="4 LoRAs were given; at most 3"):
        own.set_loras([str(file)] * 4)
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a.ckpt is not a .safetensors file"):
        own.set_loras([str(tmp_path / "a.ckpt")])


def test_what_klein_lacks_is_left_out_and_reported(own, tmp_path):
    file = tmp_path / "a.safetensors"
    write_lora(file, own, seed=1, **{"transformer.other.lora_A.weight": torch.ones(4, 8)})
    own.set_loras([str(file)])
    (report,) = own.lora_reports
    assert (report.applied, report.total) == (len(MODULES), len(MODULES) + 1)
    assert dict(report.left_out) == {"transformer.other": "FLUX.2 has no such module"}
    own.set_loras([])
    assert own.lora_reports == []


def test_a_file_that_would_apply_in_part_is_refused_and_leaves_nothing_behind(own, tmp_path):
    plain = own("a cat", **SMALL).latents
    file = tmp_path / "bad.safetensors"
    write_lora(file, own, seed=1)
    state = load_file(file)
    key = f"transformer.{MODULES[0]}.lora_B.weight"
    broken = {
        "other shapes": {**state, key: torch.ones(64, 4)},
        "NaN": {**state, key: torch.full_like(state[key], np.nan)},
        "NaN in A": {**state, f"transformer.{MODULES[1]}.lora_A.weight": torch.full((4, 128), np.nan)},
        "no LoRA": {"weight": torch.ones(3)},
    }
    for what, tensors in broken.items():
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"LoRA bad.safetensors (changes|holds NaN|holds nothing)") as error:
            own.set_loras([str(file)])
        assert "\n" not in str(error.value), what
        assert own.loras == []
        assert torch.equal(own("a cat", **SMALL).latents, plain), what
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"LoRA bad.safetensors is not a safetensors file"):
        own.set_loras([str(file)])


def test_a_lora_that_was_trained_on_is_read_again(own, tmp_path):
    file = tmp_path / "a.safetensors"
    results = []
    for seed in (1, 2):
        write_lora(file, own, seed=seed)
        own.set_loras([str(file)])
        results.append(own("a cat", **SMALL).latents)
    own.set_loras([])
    assert not torch.allclose(*results, atol=1e-2)


def test_a_pipeline_with_loras_is_not_saved(own, tmp_path):
    file = tmp_path / "a.safetensors"
    write_lora(file, own, seed=1)
    own.set_loras([str(file)])
    with pytest.raises(ValueError, match=r"LoRAs are loaded \(a.safetensors\); take them off with set_loras"):
        own.save_pretrained(tmp_path / "saved")
    own.set_loras([])
    assert not (tmp_path / "saved").exists()
