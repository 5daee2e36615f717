"""Nodes of other packs that open as ours, as ComfyUI tells its frontend and as it runs an API-format graph."""

from __future__ import annotations

import pytest
import torch
from comfy_graph import custom_sampling, failure, node, result
from klein_cns.sampler import CNSParams

CHENGOU = {  # every widget away from its default
    "s_churn": 0.7, "power_gamma": 0.6, "gamma_divider": 3.25, "energy_scale": 0.91, "alpha_tilt_start": 0.4,
    "alpha_tilt_end": -0.8, "alpha_use_fnorm": True, "alpha_exp_interp": False, "alpha_exp_sharpness": 1.5,
    "num_freq_bins": 16, "use_bundled_gamma_matrix": True,
}  # fmt: skip
CARRIED = {name: value for name, value in CHENGOU.items() if name != "use_bundled_gamma_matrix"}


@pytest.fixture
def replaces(server):
    if server.version < (0, 14):
        pytest.skip("this ComfyUI has no node replacement; 0.14 and newer have")


def test_every_input_of_ours_is_copied_or_set_to_what_is_allowed(server, replaces):
    (told,) = server.get("/node_replacements")["CNSSampler_CHENGOU"]
    inputs = server.get("/object_info/CNSSampler")["CNSSampler"]["input"]
    info = {**inputs["required"], **inputs.get("optional", {})}
    assert told["new_node_id"] == "CNSSampler" and told["old_widget_ids"] == list(CHENGOU)
    assert told["output_mapping"] == [{"new_idx": 0, "old_idx": 0}]
    mapping = {entry["new_id"]: entry for entry in told["input_mapping"]}
    assert set(mapping) == set(info) and len(mapping) == len(told["input_mapping"])
    assert {f"cns_{name}": name for name in CARRIED} == {
        name: entry["old_id"] for name, entry in mapping.items() if "old_id" in entry
    }
    for name, entry in mapping.items():
        if "set_value" in entry and isinstance(entry["set_value"], str):
            kind, options = info[name]
            allowed = options["options"] if kind == "COMBO" else kind
            assert entry["set_value"] in allowed, name


def test_a_graph_with_the_other_node_runs_as_ours_with_its_values(server, replaces):
    params = CNSParams(formula="authors", **CARRIED)
    expected = result(server, custom_sampling("ours", params))
    prompt = custom_sampling("theirs", CNSParams())
    prompt["cns"] = {**node("CNSSampler_CHENGOU", **CHENGOU), "_meta": {"title": "CNS"}}
    assert torch.equal(result(server, prompt), expected)


def test_a_node_that_is_not_replaced_stays_missing(server, replaces):
    prompt = custom_sampling("missing", CNSParams())
    prompt["cns"] = {**node("ColoredNoise_SamplerSelect", base_sampler="er_sde"), "_meta": {"title": "other"}}
    assert "ColoredNoise_SamplerSelect" in failure(server, prompt)
