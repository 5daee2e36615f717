"""A workflow with another pack's CNS node, opened in both renderers: ComfyUI offers ours, which has its values."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("playwright")  # before a server is started for it
VALUES = [0.7, 0.6, 3.25, 0.91, 0.4, -0.8, False, False, 1.5, 16, True]  # in the order of its widgets
# As the frontend saves it: the node whose pack is absent, linked to a sampler.
WORKFLOW = {
    "version": 0.4, "last_node_id": 2, "last_link_id": 1, "groups": [], "config": {}, "extra": {},
    "nodes": [
        {"id": 1, "type": "CNSSampler_CHENGOU", "pos": [100, 100], "size": [320, 320], "flags": {}, "order": 0,
         "mode": 0, "inputs": [], "outputs": [{"name": "sampler", "type": "SAMPLER", "links": [1]}],
         "properties": {"Node name for S&R": "CNSSampler_CHENGOU"}, "widgets_values": VALUES},
        {"id": 2, "type": "SamplerCustomAdvanced", "pos": [600, 100], "size": [270, 330], "flags": {}, "order": 1,
         "mode": 0, "inputs": [
             {"name": "noise", "type": "NOISE", "link": None}, {"name": "guider", "type": "GUIDER", "link": None},
             {"name": "sampler", "type": "SAMPLER", "link": 1}, {"name": "sigmas", "type": "SIGMAS", "link": None},
             {"name": "latent_image", "type": "LATENT", "link": None},
         ], "outputs": [{"name": "output", "type": "LATENT", "links": []},
                        {"name": "denoised_output", "type": "LATENT", "links": []}],
         "properties": {"Node name for S&R": "SamplerCustomAdvanced"}, "widgets_values": []},
    ],
    "links": [[1, 1, 0, 2, 2, "SAMPLER"]],
}  # fmt: skip
EXPECTED = {
    "cns_s_churn": 0.7, "cns_power_gamma": 0.6, "cns_gamma_divider": 3.25, "cns_energy_scale": 0.91,
    "cns_alpha_tilt_start": 0.4, "cns_alpha_tilt_end": -0.8, "cns_alpha_use_fnorm": False,
    "cns_alpha_exp_interp": False, "cns_alpha_exp_sharpness": 1.5, "cns_num_freq_bins": 16, "solver": "euler",
    "cns_gamma_source": "matrix", "cns_formula": "authors", "cns_gamma_file": "sit_xl2_unguided", "cns_seed": -1,
    "acceleration": "none",
}  # fmt: skip
OPENED = """() => window.app.graph._nodes.map((node) => ({
  type: node.type,
  values: Object.fromEntries((node.widgets ?? []).map(({ name, value }) => [name, value])),
}))"""


def test_a_workflow_with_the_other_node_opens_as_ours(server, one_page):
    if server.version < (0, 14):
        pytest.skip("this ComfyUI has no node replacement; 0.14 and newer have")
    one_page.load(WORKFLOW, "chengou")
    one_page.click("View details")
    one_page.click("Replace Node")
    found = one_page.until(OPENED, lambda nodes: nodes[0]["type"] == "CNSSampler")
    values = found[0]["values"]
    assert {name: values.get(name) for name in EXPECTED} == EXPECTED
    assert [link[:5] for link in one_page.saved()["links"]] == [[1, 1, 0, 2, 2]]
