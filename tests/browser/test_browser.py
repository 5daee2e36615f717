"""The pack in ComfyUI's frontend, in both renderers: missing models, what a node said, and the picture sockets."""

from __future__ import annotations

import json

import pytest
from comfy_graph import EXAMPLES, example
from klein_cns.weights.components import WANTED
from lora_formats import FORMATS, save, write

pytestmark = pytest.mark.usefixtures("playwright")  # before a server is started for it
LORA = "style.safetensors"
LABELS = ["picture 1", "picture 2", "picture 3", "picture 4"]
BOXES = "() => [...document.querySelectorAll('.klein-said')].map((box) => box.innerText)"
NODE = "(type) => window.app.graph._nodes.find((node) => node.type === type)"


def workflow(name):
    return json.loads((EXAMPLES / f"{name}.json").read_text())


def values(workflow, kind):
    return next(one["widgets_values"] for one in workflow["nodes"] if one["type"] == kind)


@pytest.fixture(scope="module")
def lora_run(server):
    """The example with a LoRA whose report has many lines, one step long."""
    from klein_cns.klein import tiny

    sample = write(FORMATS["diffusion_model.<BFL>"], tiny().transformer.state_dict(), seed=1, size=0.1)
    save(sample, server.base / "models" / "loras" / LORA)
    made = workflow("Edit with four pictures and LoRAs")
    values(made, "KleinLoraStack")[0] = LORA
    steps = values(made, "CNSKSampler")
    steps[steps.index(28)] = 1
    return made


@pytest.mark.parametrize("name", ["Edit a picture", "Local or fal"])
def test_missing_models_are_offered(fresh, open_page, name):
    """As the official templates' are: all three, each with its address, before anything is run."""
    page = open_page(fresh)
    page.load(workflow(name))
    page.click("View details")
    text = page.text()
    assert "Missing Models" in text
    for wanted in WANTED.values():
        file, repository = wanted.sources[0]
        assert file in text and f"{wanted.folder}\nDownload" in text
        asked = [url for url in page.elsewhere() if url.startswith(f"https://huggingface.co/{repository}/resolve/")]
        assert asked and asked[0].endswith(f"/{file}")


def test_an_error_is_one_sentence_without_a_path(fresh, open_page):
    page = open_page(fresh)
    page.load(workflow("Text to image with klein"))
    ended = page.run()
    assert ended["kind"] == "execution_error" and ended["type"] == "ValueError"
    page.click("View details")
    shown = page.until("() => document.body.innerText", lambda text: "Stack Trace" in text)
    message = shown.split("Exception Message:")[1].split("Stack Trace")[0]
    assert message.lstrip("* ").startswith("ValueError: 'flux-2-klein-base-9b-fp8.safetensors' does not exist; ")
    assert message.count("needed is Qwen3-8B, usually") == 1


def test_what_a_node_said_is_read_and_stays(server, open_page, lora_run):
    """Complete and with its lines; again after a reload of the saved workflow, and in a run from the cache."""
    page = open_page(server)
    page.load(lora_run)
    assert page(BOXES) == []
    assert page.run()["kind"] == "execution_success"
    boxes = page(BOXES)
    assert any(text.startswith("random test weights, the picture will be noise: ") for text in boxes)
    report = next(text for text in boxes if LORA in text)
    assert report.startswith(f"{LORA} at 1: 31 of 31 modules apply, 31 merged\n") and "\n  made for: " in report
    saved = page.saved()
    assert values(saved, "KleinLoraStack") == values(lora_run, "KleinLoraStack")
    assert not any("klein_said" in inputs for inputs in page.sent().values())
    page.reload()
    page.load(saved)
    assert sorted(page(BOXES)) == sorted(boxes)
    page.load(lora_run)
    assert page(BOXES) == []
    assert page.run()["kind"] == "execution_success"
    assert sorted(page(BOXES)) == sorted(boxes), "not sent again from the cache"


def test_a_text_is_not_saved_beside_other_values(server, open_page, lora_run):
    """It was said about a LoRA that is no longer chosen."""
    page = open_page(server)
    page.load(lora_run)
    page.run()
    page(f"() => {{ ({NODE})('KleinLoraStack').widgets.find(({{ name }}) => name === 'lora_1').value = 'none'; }}")
    assert LORA not in json.dumps(page.saved())


def test_the_box_is_as_tall_as_its_text_and_scrolls_where_that_is_too_much(server, open_page, lora_run):
    page = open_page(server)
    page.load(lora_run)
    for lines, scrolls in ((3, False), (200, True)):
        text = "\n".join(f"line {i}" for i in range(lines))
        page(f"(text) => {{ ({NODE})('KleinLoraStack').onExecuted({{ text: [text] }}); }}", text)
        page("() => new Promise((resolve) => setTimeout(resolve, 1000))")
        [box] = page(
            "() => [...document.querySelectorAll('.klein-said')].map((box) => "
            "[box.innerText, box.scrollHeight, box.clientHeight])"
        )
        assert box[0] == text
        assert (box[1] > box[2] + 2) == scrolls and box[2] > 3 * 14, box
    view = page("() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]")
    page.scroll(".klein-said", 300)
    page("() => new Promise((resolve) => setTimeout(resolve, 500))")
    assert page("() => document.querySelector('.klein-said').scrollTop") == 300
    assert page("() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]") == view


def test_picture_sockets_keep_their_numbers(server, open_page):
    """A middle one that is disconnected moves no other."""
    page = open_page(server)
    page.load(workflow("Edit with four pictures and LoRAs"))
    before = page.sent()["7"]
    conditioner = f"({NODE})('KleinEditConditioner')"
    page(f"() => {{ {conditioner}.disconnectInput({conditioner}.findInputSlot('images.image_1')); }}")
    page("() => new Promise((resolve) => setTimeout(resolve, 500))")
    del before["images.image_1"]
    assert page.sent()["7"] == before
    labels = page(f"() => {conditioner}.inputs.map(({{ label, name }}) => [name, label])")
    assert [entry for entry in labels if "." in entry[0]] == [
        [f"images.image_{i}", label] for i, label in enumerate(LABELS)
    ]  # fmt: skip


def test_a_file_of_growing_sockets_opens(server, open_page):
    """As it was saved before: the sockets up to the first free one, labelled by the ends of their ids."""
    page = open_page(server)
    for name in ("Edit inside a mask", "Edit on fal"):
        page.load(with_growing_sockets(workflow(name)), name)
        assert page.sent() == {key: one["inputs"] for key, one in example(name).items()}
        labels = page("() => window.app.graph._nodes.flatMap((node) => node.inputs ?? []).map(({ label }) => label)")
        assert [label for label in labels if label and label.startswith(("picture", "image_"))] == LABELS


def with_growing_sockets(old):
    for one in old["nodes"]:
        inputs = one.get("inputs", [])
        free = [entry for entry in inputs if entry["name"].startswith("images.") and entry["link"] is None]
        for entry in free[1:]:
            inputs.remove(entry)
        for slot, entry in enumerate(inputs):
            if entry["name"].startswith("images."):
                entry["label"] = entry["name"].removeprefix("images.")
            for link in old["links"]:
                if link[0] == entry["link"]:
                    link[4] = slot
    return old
