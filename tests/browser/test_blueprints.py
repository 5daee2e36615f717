"""The blueprints in both renderers: one node that runs, and that can be opened up."""

from __future__ import annotations

import json

import pytest
from comfy_host import ROOT

pytestmark = pytest.mark.usefixtures("playwright")  # before a server is started for it
# A picture, the blueprint, and its result; small and quick.
USE = """(values) => {
  const add = (type, x) => {
    const node = window.LiteGraph.createNode(type);
    node.pos = [x, 0];
    window.app.graph.add(node);
    return node;
  };
  const [blueprint] = window.app.graph._nodes;
  const picture = add("LoadImage", -400);
  picture.widgets[0].value = "blueprint.png";
  picture.connect(0, blueprint, 0);
  blueprint.connect(0, add("PreviewImage", 500), 0);
  for (const [name, value] of Object.entries(values)) {
    const widget = blueprint.widgets.find((one) => one.name === name);
    if (widget) widget.value = value;
  }
}"""
MASK = """() => {
  const [blueprint, picture] = window.app.graph._nodes;
  picture.connect(1, blueprint, blueprint.findInputSlot("mask"));
}"""
OPENED = """async () => {
  const { subgraph } = window.app.graph._nodes[0];
  window.app.canvas.setGraph(subgraph);
  await new Promise((resolve) => setTimeout(resolve, 2000));
  const shown = [...document.querySelectorAll(".klein-before, .klein-noise")].map((box) => box.innerText);
  window.app.canvas.setGraph(window.app.graph.rootGraph);
  return { types: subgraph.nodes.map(({ type }) => type), shown };
}"""


@pytest.mark.parametrize("name", ["Klein 9B Base edit", "Klein 9B Base edit (local or fal)"])
def test_it_runs_as_one_node_and_opens_up(server, one_page, photo, name):
    picture = photo.convert("RGBA").resize((96, 64))
    picture.paste((0, 0, 0, 0), (0, 0, 48, 64))  # Load Image makes a mask of what is transparent
    picture.save(server.base / "input" / "blueprint.png")
    one_page.load(json.loads((ROOT / "subgraphs" / f"{name}.json").read_text()), name)
    one_page(USE, {"steps": 2, "prompt": "a hat", "seed": 3, "enable_cns": True, "mode": "local"})
    assert one_page.run()["kind"] == "execution_success"
    if "fal" not in name:
        one_page(MASK)
        assert one_page.run()["kind"] == "execution_success"
    opened = one_page(OPENED)
    assert {"KleinBaseLoader", "KleinLoraStack", "KleinEditConditioner", "CNSKSampler"} <= set(opened["types"])
    words = "\n".join(opened["shown"])
    assert "Result 96 x 64: 24 tokens; picture 1: 24; together 48" in words, words
    assert "2 steps at 96 x 64" in words, words
