"""The blueprints that ComfyUI's node library shows: served whole, and made of this pack's nodes."""

from __future__ import annotations

import json

import pytest
from comfy_host import ROOT

BLUEPRINTS = sorted(ROOT.glob("subgraphs/*.json"))
ASKED = {
    "image_1", "image_2", "image_3", "image_4", "prompt", "negative_prompt", "image_size", "width", "height", "steps",
    "cfg", "seed", "enable_cns", "lora_1", "strength_1", "lora_2", "strength_2", "lora_3", "strength_3",
}  # fmt: skip


def test_there_are_two():
    assert {path.stem for path in BLUEPRINTS} == {"Klein 9B Base edit", "Klein 9B Base edit (local or fal)"}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_the_server_offers_it_with_this_packs_nodes_inside(server, path):
    offered = server.get("/global_subgraphs")
    [key] = [key for key, one in offered.items() if one["name"] == path.stem]
    assert offered[key]["info"]["node_pack"] == "custom_nodes.klein-cns"
    found = json.loads(server.get(f"/global_subgraphs/{key}")["data"])
    assert found == json.loads(path.read_text())
    [subgraph], [outside] = found["definitions"]["subgraphs"], found["nodes"]
    assert outside["type"] == subgraph["id"] and subgraph["name"] == path.stem
    assert {one["name"] for one in subgraph["inputs"]} >= ASKED
    ours = {kind for kind, node in server.get("/object_info").items() if node["python_module"].endswith("klein-cns")}
    assert {one["type"] for one in subgraph["nodes"]} <= ours
    assert found["extra"]["BlueprintDescription"]
