"""LoRAs on a real ComfyUI MODEL, in one process: every format, stacks, DoRA, bypass, beside ComfyUI's own patches."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from comfy_host import ROOT
from klein_cns.klein import tiny
from klein_cns.klein.convert import bfl_to_diffusers, diffusers_to_bfl
from lora_formats import FORMATS, NEW_FORM, save, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

EXACT = 1e-5
SCRIPT = Path(__file__).with_name("lora_on_comfyui.py")


@pytest.fixture(scope="module")
def state():
    return tiny(seed=3).transformer.state_dict()


class Cases:
    """Cases collected, then run by one process of ComfyUI's Python."""

    def __init__(self, comfyui, folder, state):
        self.comfyui, self.folder, self.cases = comfyui, folder, []
        self.base = diffusers_to_bfl(state)
        generator = torch.Generator().manual_seed(1)
        self.inputs = {
            "x": torch.randn(1, 128, 4, 6, generator=generator),
            "context": torch.randn(1, 5, 96, generator=generator),
            "sigma": torch.tensor([0.7]),
        }
        save_file(self.base, folder / "weights.safetensors")
        save_file(self.inputs, folder / "inputs.safetensors")

    def add(self, *steps):
        self.cases.append({"steps": steps, "result": str(self.folder / f"result{len(self.cases)}.safetensors")})

    def run(self, quantise="", compile=False, new_form=""):
        """(plain, the result of each case, plain again)."""
        given, self.printed = self._start(quantise=quantise, compile=compile, new_form=new_form)
        return (
            load_file(given["plain"]),
            [load_file(case["result"]) for case in self.cases],
            load_file(given["after"]),
        )

    def held(self, files):
        """What ``lora_on_comfyui.py`` prints of these."""
        return json.loads(self._start(held=[str(file) for file in files])[1].splitlines()[-1])

    def _start(self, quantise="", compile=False, held=(), new_form=""):
        """The files of a run, and what it printed."""
        python_folder, python = self.comfyui
        given = {name: str(self.folder / f"{name}.safetensors") for name in ("weights", "inputs", "plain", "after")}
        file = self.folder / "cases.json"
        options = {"quantise": quantise, "compile": compile, "held": held, "new_form": str(new_form)}
        file.write_text(json.dumps({**given, **options, "cases": self.cases}))
        done = subprocess.run(
            [python, SCRIPT, ROOT, file], cwd=python_folder, capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, "PYTHONPATH": str(python_folder)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert "ERROR" not in done.stderr and "not loaded" not in done.stderr, done.stderr[-4000:]
        return given, done.stdout


@pytest.fixture
def cases(comfyui, tmp_path, state):
    return Cases(comfyui, tmp_path, state)


def assert_changed_by(found, plain, *deltas):
    """Every weight changed by the sum of these, relative 1e-5, and every other not by a bit."""
    for name in deltas[0]:
        change = sum(delta[name].double() for delta in deltas)
        if not change.any():
            assert torch.equal(found[name], plain[name]), name
        else:
            distance = float((found[name].double() - plain[name] - change).norm() / change.norm())
            assert distance <= EXACT, (name, distance)


@pytest.fixture(scope="module")
def diffusers_output():
    """The other host's output for the same inputs, its weights changed by hand."""
    transformer = tiny(seed=3).transformer

    def ids(*axes):
        return torch.cartesian_prod(*(torch.arange(axis) for axis in axes)).float()

    def run(cases, *deltas):
        changed = {name: weight + sum(delta.get(name, 0) for delta in deltas) for name, weight in cases.base.items()}
        transformer.load_state_dict(bfl_to_diffusers(changed))
        with torch.no_grad():
            tokens = transformer(
                hidden_states=cases.inputs["x"].flatten(2).mT, encoder_hidden_states=cases.inputs["context"],
                timestep=cases.inputs["sigma"], txt_ids=ids(1, 1, 1, 5), img_ids=ids(1, 4, 6, 1), return_dict=False,
            )[0]  # fmt: skip
        return tokens.mT.reshape(cases.inputs["x"].shape)

    return run


def assert_same_output(found, expected):
    assert float((found - expected).norm() / expected.norm()) <= EXACT


def saved(form, state, folder, seed, strength=1.0):
    """(path, strength) of a new LoRA, and what it does at that strength."""
    sample = write({**FORMATS, **NEW_FORM}[form], state, seed, strength)
    path = folder / f"{seed}-{strength}" / "a.safetensors"
    save(sample, path)
    return [str(path), strength], sample.delta


def test_every_format_applies_exactly_and_both_hosts_agree(cases, state, tmp_path, diffusers_output, seed):
    deltas = []
    for i, form in enumerate(FORMATS):
        lora, delta = saved(form, state, tmp_path, seed + i)
        deltas.append(delta)
        cases.add({"klein": [lora], "apply": "auto"})
    plain, found, after = cases.run()
    assert all(torch.equal(plain[name], after[name]) for name in plain)
    assert_same_output(plain["output"], diffusers_output(cases))
    for delta, result in zip(deltas, found, strict=True):
        assert_changed_by(result, plain, delta)
        assert float((result["output"] - plain["output"]).abs().max()) > 1e-4
        assert_same_output(result["output"], diffusers_output(cases, delta))


PLAIN = ("lora_unet_<diffusers>", "lycoris_<BFL> LoKr", "lora_unet_<BFL> LoHa")
DORAS = ("peft, DoRA", "lora_unet_<BFL> DoRA")
STRENGTHS = (0.7, -1.2, 0.3)
COMFYUI_READS = "lora_unet_<BFL>"


def test_stacks_add_up_merged_and_bypassed(cases, state, tmp_path, diffusers_output, seed):
    """Three of different forms, q, k and v apart among them; beside what ComfyUI's own loaders put on the model."""
    made = [saved(form, state, tmp_path, seed + i, s) for i, (form, s) in enumerate(zip(PLAIN, STRENGTHS, strict=True))]
    stack, deltas = [lora for lora, _ in made], [delta for _, delta in made]
    own, own_delta = saved(COMFYUI_READS, state, tmp_path, seed + 9)
    native = {"comfyui": own[0], "strength": own[1]}
    for apply in ("merge", "bypass"):
        klein = {"klein": stack, "apply": apply}
        cases.add(klein)
        cases.add(native, klein)
        cases.add(klein, native)
        cases.add({**native, "bypass": True}, klein)
        cases.add(klein, {**native, "bypass": True})
        cases.add({"klein": stack[:1], "apply": apply}, {"klein": stack[1:], "apply": apply})
    plain, found, after = cases.run()
    assert all(torch.equal(plain[name], after[name]) for name in plain)
    for i, result in enumerate(found):
        expected = [*deltas, own_delta] if i % 6 in (1, 2, 3, 4) else deltas
        assert_changed_by(result, plain, *expected)
        assert_same_output(result["output"], diffusers_output(cases, *expected))


@pytest.mark.parametrize("apply", ["merge", "bypass"])
def test_a_compiled_model_follows_every_change(cases, state, tmp_path, apply, seed):
    """One compiled model: without LoRA, at two strengths, without again, and beside ComfyUI's own bypass."""
    own, _ = saved(COMFYUI_READS, state, tmp_path, seed + 9)
    lora, _ = saved(PLAIN[0], state, tmp_path, seed)
    for strength in (1.0, 0.5, 0.0, 1.0):
        cases.add({"klein": [[lora[0], strength]], "apply": apply})
    cases.add({"klein": [lora], "apply": apply}, {"comfyui": own[0], "strength": own[1], "bypass": True})
    plain, found, after = cases.run(compile=True)
    assert torch.equal(plain["output"], after["output"])
    for result in (plain, *found, after):
        assert_same_output(result["compiled"], result["output"])
    outputs = [result["output"] for result in found]
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-4 < float((outputs[0] - outputs[4]).abs().max())


def test_a_dora_stands_on_the_base_weight_wherever_it_stands_in_a_stack(cases, state, tmp_path, diffusers_output, seed):
    made = [
        saved(form, state, tmp_path, seed + i, s)
        for i, (form, s) in enumerate(zip((PLAIN[0], *DORAS), STRENGTHS, strict=True))
    ]
    stack, deltas = [lora for lora, _ in made], [delta for _, delta in made]
    own, own_delta = saved(COMFYUI_READS, state, tmp_path, seed + 9)
    native = {"comfyui": own[0], "strength": own[1]}
    cases.add(native, {"klein": stack, "apply": "auto"})
    cases.add({"klein": stack[::-1], "apply": "merge"}, native)
    cases.add({"klein": stack[1:2], "apply": "auto"}, native, {"klein": [stack[2], stack[0]], "apply": "auto"})
    cases.add({"klein": [[stack[1][0], 0.0], [stack[2][0], 0.0]], "apply": "auto"})
    plain, found, _ = cases.run()
    for result in found[:3]:
        assert_changed_by(result, plain, *deltas, own_delta)
        assert_same_output(result["output"], diffusers_output(cases, *deltas, own_delta))
    assert all(torch.equal(found[3][name], plain[name]) for name in plain)


@pytest.mark.parametrize("quantise", ["float8_e4m3fn", "nvfp4", "storage"])
def test_quantised_weights_are_left_alone_unless_a_dora_needs_them(cases, state, tmp_path, quantise, seed):
    """A weak LoRA: bypassed it is exact, merged it drowns in the rounding. What is not quantised is merged."""
    weak, delta = saved(PLAIN[0], state, tmp_path, seed, 0.02)
    dora, _ = saved(DORAS[0], state, tmp_path, seed + 1)
    for stack, apply in (([weak], "auto"), ([weak], "merge"), ([weak, dora], "auto")):
        cases.add({"klein": stack, "apply": apply})
    plain, found, after = cases.run(quantise)
    assert all(torch.equal(plain[name], after[name]) for name in plain)
    name = "single_blocks.1.linear1.weight"
    errors = [float((result[name] - plain[name] - delta[name]).norm() / delta[name].norm()) for result in found[:2]]
    assert errors[0] <= 1e-3 < 0.3 < errors[1]  # the weights are of size 1 / strength / size beside the change
    with safe_open(cases.cases[2]["result"], framework="pt") as file:
        (plain_lora, dora_alone) = json.loads(file.metadata()["how"])
    quantised = {"bypassed": 39} if quantise == "storage" else {"bypassed": 30, "merged": 9}
    assert plain_lora == quantised and dora_alone == {"merged": 39}


def test_a_lora_is_in_memory_as_long_as_a_model_uses_it(cases, state, tmp_path, seed):
    """And the last three as long as the model that they were put on, so that changing a strength reads no file."""
    files = [saved(COMFYUI_READS, state, tmp_path, seed + i)[0][0] for i in range(4)]
    assert cases.held(files) == [[True] * 4, [False, True, True, True], [False] * 4]


def test_a_new_form_is_a_class_in_the_list_of_forms_and_a_line_in_a_hosts_table(cases, state, tmp_path, seed):
    """As CONTRIBUTING.md says; merged and bypassed. The diffusers host has the same test."""
    made = [saved(form, state, tmp_path, seed + i, 0.7) for i, form in enumerate(NEW_FORM)]
    for lora, _ in made:
        for apply in ("merge", "bypass"):
            cases.add({"klein": [lora], "apply": apply})
    plain, found, _ = cases.run(new_form=ROOT / "tests" / "lora_new_form.py")
    says = json.loads(cases.printed.splitlines()[-1])
    assert says == "ComfyUI's side cannot merge a rank one; add it to PATCHES in nodes/lora_patches.py."
    for i, result in enumerate(found):
        assert_changed_by(result, plain, made[i // 2][1])
