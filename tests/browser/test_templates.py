"""Every template in both renderers: opened from the template browser, saved, loaded and run."""

from __future__ import annotations

import json

import pytest
from comfy_base import serve_examples
from comfy_graph import EXAMPLES, example
from fal_server import FalServer, png
from PIL import Image

pytestmark = [pytest.mark.usefixtures("playwright"), pytest.mark.xdist_group("templates")]  # one server for the module
PACK = "klein-cns"  # the folder's name
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
STORE = "window.document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia.state.value"
MISSING = f"""() => {{
    const {{ missingMedia, missingModel, missingNodesError }} = {STORE};
    return [missingMedia.missingMediaCandidates, missingModel.missingModelCandidates,
            missingNodesError.missingNodesError].filter((found) => found && found.length !== 0);
}}"""
SEEN = """() => [...window.document.querySelectorAll("[data-testid=linear-image-output]")].map(
    (image) => [image.naturalWidth, image.naturalHeight])"""
SHORTEN = """() => {
    for (const node of window.app.graph._nodes) {
        const steps = ["CNSKSampler", "Flux2Scheduler"].includes(node.type) ? "steps" : "";
        for (const widget of node.widgets ?? []) if (widget.name === steps) widget.value = 1;
    }
}"""


@pytest.fixture(scope="module")
def gallery(comfyui, host_pipeline, tmp_path_factory):
    """A ComfyUI on which every template runs, with its pictures at a quarter of their sides, so that it is quick."""
    fal = FalServer()
    fal.picture = png((512, 512), (120, 120, 120))
    running = serve_examples(comfyui, tmp_path_factory.mktemp("gallery"), host_pipeline, fal)
    for path in (running.base / "input").glob("klein_cns_*"):
        with Image.open(path) as picture:
            small = picture.convert("RGBA" if path.suffix == ".png" else "RGB").resize(
                (picture.width // 4, picture.height // 4), Image.Resampling.NEAREST
            )
        small.save(path)
    yield running
    running.stop()
    fal.close()


def values(workflow):
    return {one["id"]: one.get("widgets_values") for one in workflow["nodes"]}


def inputs(prompt):
    return {key: one["inputs"] for key, one in prompt.items()}


def test_each_opens_keeps_its_values_runs_and_covers_no_node(gallery, open_page):
    page = open_page(gallery)
    for name in NAMES:
        page.template(PACK, name)
        assert page(MISSING) == [], name
        assert page.sent() == inputs(example(name)), name
        saved = page.saved()
        assert values(saved) == values(json.loads((EXAMPLES / f"{name}.json").read_text())), name
        page.load(saved, name)
        assert values(page.saved()) == values(saved), name
        assert page.sent() == inputs(example(name)), name
        assert page.covered() == [], f"{name}, before a run"
        page(SHORTEN)
        assert page.run()["kind"] == "execution_success", name
        assert page.covered() == [], f"{name}, after a run"
        assert page.errors() == [], name
        asked = json.loads((EXAMPLES / f"{name}.json").read_text())["extra"]["linearData"]["inputs"]
        shown = page.app()
        assert [word for word in shown if word in {socket for _, socket in asked}] == [socket for _, socket in asked]


def test_an_edit_as_an_app(gallery, open_page):
    """With the words that are typed into the app, and Run as it shows it; the picture is then there."""
    page = open_page(gallery)
    page.template(PACK, "Edit a picture")
    page(SHORTEN)
    assert page.app()[0] == "image"
    assert page(SEEN) == []
    page.fill("[data-testid=linear-widgets] textarea", "make the coat red")
    assert page.run(app=True)["kind"] == "execution_success"
    assert page.sent()["3"]["prompt"] == "make the coat red"
    assert page.until(SEEN, bool) == [[128, 128]]
    assert page.errors() == []
