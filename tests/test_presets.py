"""The presets, against what their sources state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from endpoint_facts import BOTH
from klein_cns.klein import PRESETS, KleinRequest, preset
from klein_cns.sampler import shipped_progress
from test_cli import QUICK, parameters

# What the authors pass for their two published results (README of HadarDavidson/colored-noise-sampling).
UNGUIDED = {
    "--power-gamma": "0.75", "--gamma-matrix-divider": "1.73", "--alpha-tilting": "0.15 -0.5",
    "--alpha-tilting-use-fnorm": "", "--alpha-exponential-interpolation": "",
    "--alpha-exponential-interpolation-sharpness": "0.75", "--energy-scale": "0.98",
}  # fmt: skip
GUIDED = {
    "--power-gamma": "0.5", "--gamma-matrix-divider": "25.0", "--alpha-tilting": "-0.1 0.03",
    "--alpha-tilting-use-fnorm": "", "--energy-scale": "0.998",
}  # fmt: skip


def test_endpoint_has_the_documented_defaults():
    documented = {name: default for name, (_, default, _) in BOTH.items()}
    ours = preset("endpoint")
    assert ours.pop("enable_cns") is True  # the one that is not the endpoint's: a preset of CNS turns it on
    shared = ours.keys() & documented.keys()
    assert len(shared) == 13 and {name: ours[name] for name in shared} == {name: documented[name] for name in shared}
    assert {name: ours[name] for name in ours.keys() - shared} == {
        "solver": "euler",
        "scheduler": "flux2",
        "cns_formula": "endpoint",
        "cns_gamma_file": "sit_xl2_unguided",
    }


def test_guided_differs_in_what_the_endpoint_advises():
    plain, guided = preset("endpoint"), preset("endpoint, guided")
    changed = {name: value for name, value in guided.items() if plain[name] != value}
    assert plain.keys() == guided.keys() and changed == {"cns_gamma_divider": 25.0, "cns_energy_scale": 0.998}


@pytest.mark.parametrize(
    "name, flags, gamma",
    [("paper, unguided", UNGUIDED, "sit_xl2_unguided"), ("paper, guided", GUIDED, "sit_xl2_cfg_1.5")],
)
def test_paper_has_the_values_of_the_authors_commands(name, flags, gamma):
    ours = preset(name)
    start, end = flags["--alpha-tilting"].split()
    assert ours["cns_power_gamma"] == float(flags["--power-gamma"])
    assert ours["cns_gamma_divider"] == float(flags["--gamma-matrix-divider"])
    assert (ours["cns_alpha_tilt_start"], ours["cns_alpha_tilt_end"]) == (float(start), float(end))
    assert ours["cns_alpha_use_fnorm"] is ("--alpha-tilting-use-fnorm" in flags)
    assert ours["cns_alpha_exp_interp"] is ("--alpha-exponential-interpolation" in flags)
    assert ours["cns_energy_scale"] == float(flags["--energy-scale"])
    assert (ours["solver"], ours["cns_s_churn"], ours["cns_formula"]) == ("sde", 1.0, "authors")  # w = sigma
    assert ours["cns_gamma_file"] == gamma


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_is_reported(pipeline, name):
    values = preset(name)
    result = pipeline("a cat", seed=3, image_size=(64, 64), **{**values, "num_inference_steps": 2})
    for field in values.keys() - {"num_inference_steps", "cns_gamma_file"}:
        assert result.parameters[field] == values[field]
    gamma_file = values.get("cns_gamma_file")
    progress = shipped_progress(gamma_file) if gamma_file else None
    request = KleinRequest.from_dict({key: value for key, value in result.parameters.items() if key in _fields()})
    assert torch.equal(pipeline.run(request, progress=progress).latents, result.latents)
    assert PRESETS[name].source.endswith(".")


def test_the_command_sets_a_preset_and_options_override_it(klein, tmp_path):
    run = ("generate", "-p", "x", *QUICK, "--image-size", "64x64")
    status, _, err = klein(*run, "-o", tmp_path / "a.png", "--preset", "paper, guided", "--cns-s-churn", "0.25")
    assert status == 0 and "preset paper, guided: solver sde, enable_cns True, cns_s_churn 1.0" in err
    made = parameters(tmp_path / "a.png")
    expected = {**preset("paper, guided"), "cns_s_churn": 0.25}
    assert {name: made[name] for name in expected} == expected and made["num_inference_steps"] == 2


def test_a_preset_overrides_the_file(klein, tmp_path):
    file = tmp_path / "request.json"
    file.write_text('{"prompt": "x", "scheduler": "flux2", "enable_cns": true, "guidance_scale": 3.0}')
    run = ("generate", *QUICK, "--image-size", "64x64", "--params", file, "-o", tmp_path / "a.png")
    assert klein(*run, "--preset", "twelve")[0] == 0
    made = parameters(tmp_path / "a.png")
    assert not made["enable_cns"] and made["scheduler"] == PRESETS["twelve"].values["scheduler"]
    assert made["guidance_scale"] == 3.0


def test_another_gamma_source_leaves_the_matrix_of_the_preset_aside(klein, tmp_path):
    run = ("generate", "-p", "x", *QUICK, "--image-size", "64x64", "-o", tmp_path / "a.png", "--preset", "endpoint")
    status, _, err = klein(*run, "--cns-gamma-source", "approximation")
    assert status == 0 and "cns_gamma_file has no effect, since cns_gamma_source is 'approximation'." in err


def test_the_page_has_a_row_for_each():
    page = (Path(__file__).parents[1] / "docs" / "presets.md").read_text(encoding="utf-8")
    assert [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")] == list(PRESETS)


def test_an_unknown_preset_is_refused_with_the_list(klein, tmp_path):
    status, _, err = klein("generate", "-p", "x", "-o", tmp_path / "a.png", *QUICK, "--preset", "Twelve")
    assert status == 1 and "preset is 'Twelve'; allowed are 'endpoint', 'endpoint, guided'" in err


def _fields():
    return KleinRequest(prompt="x").to_dict().keys()
