"""Every example workflow, as the template browser and as scripts use it."""

from __future__ import annotations

import copy
import json

import pytest
from comfy_graph import EXAMPLES, example, failure, shortened
from klein_cns.weights.components import WANTED
from PIL import Image

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
LOCAL = {
    "edit_one_picture", "edit_four_pictures_lora_cns", "masked_edit", "text_to_image", "cns_on_off", "custom_sampling",
    "twelve_or_28",
}  # fmt: skip
REMOTE = {"edit_on_fal", "local_and_fal", "local_or_fal"}  # test_fal.py runs them


@pytest.fixture(scope="module")
def picture(server, photo):
    """The picture that the examples load, small, with a mask painted as the mask editor saves it: in its alpha."""
    image = photo.resize((96, 64)).convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (30, 20, 60, 50))
    image.putalpha(alpha)
    image.save(server.base / "input" / "example.png")


def test_all_are_there():
    assert set(NAMES) == LOCAL | REMOTE
    for name in NAMES:
        with Image.open(EXAMPLES / f"{name}.jpg") as preview:
            preview.verify()
    assert sorted(path.stem for path in (EXAMPLES / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_it_runs_on_tiny_files(server, picture, name):
    prompt = shortened(example(name))
    outputs = server.run(prompt)["outputs"]
    saved = [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]
    assert len(saved) == sum(one["class_type"] == "SaveImage" for one in prompt.values())
    for image in saved:
        with Image.open(server.base / "output" / image["subfolder"] / image["filename"]) as made:
            assert made.size == (96, 64)


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
        values = [value for name, value in inputs.items() if not isinstance(value, list)]
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


def test_a_mask_that_is_not_painted_is_refused(server, picture, photo):
    photo.resize((96, 64)).save(server.base / "input" / "unpainted.png")
    prompt = copy.deepcopy(example("masked_edit"))
    for one in prompt.values():
        if one["class_type"] == "LoadImage":
            one["inputs"]["image"] = "unpainted.png"
    assert "the mask is empty, so nothing may change; paint it" in failure(server, prompt)


def test_the_template_browser_finds_them(server):
    listed = server.get("/workflow_templates")
    assert sorted(listed["klein-cns"]) == NAMES
    for name in NAMES:
        assert server.get(f"/api/workflow_templates/klein-cns/{name}.json")["version"] == 0.4
