"""Every example workflow, as the template browser and as scripts use it."""

from __future__ import annotations

import copy
import json
from urllib.parse import quote

import pytest
from comfy_graph import EXAMPLES, example, failure, shortened
from klein_cns.weights.components import WANTED
from PIL import Image

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
LOCAL = {
    "Edit a picture", "Edit with four pictures and LoRAs", "Edit inside a mask", "Text to image with klein",
    "CNS off and on", "CNS with any guider and schedule", "12 steps or 28",
}  # fmt: skip
REMOTE = {"Edit on fal", "Local beside fal", "Local or fal"}  # test_fal.py runs them


def test_all_are_there():
    assert set(NAMES) == LOCAL | REMOTE
    for name in NAMES:
        with Image.open(EXAMPLES / f"{name}.jpg") as preview:
            preview.verify()
    assert sorted(path.stem for path in (EXAMPLES / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_it_runs_on_tiny_files(server, name):
    """With the pictures that come with it, also the mask; the result has the first picture's size."""
    prompt = shortened(example(name))
    first = next((one["inputs"]["image"] for one in prompt.values() if one["class_type"] == "LoadImage"), None)
    wanted = (96, 64) if first is None else Image.open(EXAMPLES / "pictures" / first).size
    outputs = server.run(prompt)["outputs"]
    saved = [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]
    assert len(saved) == sum(one["class_type"] == "SaveImage" for one in prompt.values())
    for image in saved:
        with Image.open(server.base / "output" / image["subfolder"] / image["filename"]) as made:
            assert made.size == wanted


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_says_the_same(name):
    """Node for node, value for value, link for link; what the frontend saves by position is checked by name."""
    workflow, prompt = json.loads((EXAMPLES / f"{name}.json").read_text()), example(name)
    nodes = {str(one["id"]): one for one in workflow["nodes"] if one["type"] != "MarkdownNote"}
    assert workflow["version"] == 0.4 and nodes.keys() == prompt.keys()
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    for key, one in nodes.items():
        inputs = prompt[key]["inputs"]
        assert one["type"] == prompt[key]["class_type"]
        linked = {entry["name"]: links[entry["link"]] for entry in one["inputs"] if entry["link"] is not None}
        assert linked == {name: value for name, value in inputs.items() if isinstance(value, list)}
        shown = {"compare_view"}  # of Compare Images; the frontend sends it, and does not save it
        values = [value for name, value in inputs.items() if not isinstance(value, list) and name not in shown]
        assert all(value in one.get("widgets_values", []) for value in values)


@pytest.mark.parametrize("name", NAMES)
def test_the_loader_says_where_its_files_are(name):
    """So that the frontend can offer the missing ones."""
    workflow = json.loads((EXAMPLES / f"{name}.json").read_text())
    for one in workflow["nodes"]:
        if one["type"] != "KleinBaseLoader":
            continue
        for entry, wanted, value in zip(
            one["properties"]["models"], WANTED.values(), one["widgets_values"], strict=False
        ):
            file, repository = wanted.sources[0]
            assert entry["name"] == value == file and entry["directory"] == wanted.folder
            assert entry["url"].startswith(f"https://huggingface.co/{repository}/resolve/main/")
            assert entry["url"].endswith(f"/{file}")


def test_a_mask_that_is_not_painted_is_refused(server, photo):
    photo.resize((96, 64)).save(server.base / "input" / "unpainted.png")
    prompt = copy.deepcopy(example("Edit inside a mask"))
    for one in prompt.values():
        if one["class_type"] == "LoadImage":
            one["inputs"]["image"] = "unpainted.png"
    assert "the mask is empty, so nothing may change; paint it" in failure(server, prompt)


def test_the_template_browser_finds_them(server):
    listed = server.get("/workflow_templates")
    assert sorted(listed["klein-cns"]) == NAMES
    for name in NAMES:
        assert server.get(f"/api/workflow_templates/klein-cns/{quote(name)}.json")["version"] == 0.4
