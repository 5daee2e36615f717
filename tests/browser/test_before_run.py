"""What Multi-Image Edit and Klein on fal say before a run, and the menu that collects a request, in both renderers."""

from __future__ import annotations

import json
import shutil

import pytest
from comfy_graph import EXAMPLES
from klein_cns.remote.journal import Journal

pytestmark = pytest.mark.usefixtures("playwright")  # before a server is started for it
BOX = "() => [...document.querySelectorAll('.klein-before')].map((box) => box.innerText)"
NODE = "((type) => window.app.graph._nodes.find((node) => node.type === type))"
EDIT, FAL = f"{NODE}('KleinEditConditioner')", f"{NODE}('KleinFalEdit')"


def with_picture(server, photo, name):
    """An example, with the picture that it loads, of 640 x 400, on the server."""
    found = json.loads((EXAMPLES / f"{name}.json").read_text())
    photo.resize((640, 400)).save(server.base / "input" / values(found, "LoadImage")[0])
    return found


def values(workflow, kind):
    return next(one["widgets_values"] for one in workflow["nodes"] if one["type"] == kind)


def until(page, says):
    """The box's text once it holds ``says``."""
    boxes = page.until(BOX, lambda boxes: any(says in text for text in boxes))
    return next(text for text in boxes if says in text)


def test_multi_image_edit_says_size_and_tokens(server, open_page, photo):
    """And says so again when a widget or a link changes; what is saved and sent stays as it was."""
    wanted = with_picture(server, photo, "Edit a picture")
    page = open_page(server)
    page.load(wanted)
    assert until(page, "together") == "Result 640 x 400: 1000 tokens; picture 1: 1000; together 2000"
    saved = page.saved()
    assert values(saved, "KleinEditConditioner") == values(wanted, "KleinEditConditioner")
    assert "klein_before" not in json.dumps(page("async () => (await window.app.graphToPrompt()).output"))
    page.turn(EDIT, image_size="square_hd")
    assert until(page, "1024").startswith("Result 1024 x 1024: 4096 tokens; picture 1: 1000; together 5096")
    page.turn(EDIT, num_images=2)
    assert until(page, "each of").endswith("together 5096; for each of 2 results")
    page.turn(EDIT, image_size="auto")
    page(f"() => {{ {EDIT}.disconnectInput({EDIT}.findInputSlot('images.image_0')); }}")
    assert until(page, "768") == "Result 1024 x 768: 3072 tokens; for each of 2 results"


def test_what_the_frontend_cannot_know_is_said_to_be_unknown(server, open_page, photo):
    """A picture that a node makes, which has not run."""
    page = open_page(server)
    page.load(with_picture(server, photo, "Edit a picture"))
    page(
        "() => { const made = window.LiteGraph.createNode('EmptyImage'); window.app.graph.add(made); "
        f"made.connect(0, {EDIT}, {EDIT}.findInputSlot('images.image_1')); "
        f"{EDIT}.disconnectInput({EDIT}.findInputSlot('images.image_0')); }}"
    )
    assert until(page, "not known") == ("Result: its size is not known before a run; picture 2: not known before a run")


@pytest.fixture
def folder(server):
    folder = server.base / "user" / "__klein_cns"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def test_klein_on_fal_says_price_and_key(server, open_page, photo, folder):
    wanted = with_picture(server, photo, "Edit on fal")
    (folder / "fal_key").write_text("the-id:the-secret")
    (folder / "fal_key").chmod(0o600)
    page = open_page(server)
    page.load(wanted)
    assert until(page, "key") == "fal charges at most $0.04; key: found"
    page.turn(FAL, image_size="square")
    assert until(page, "0.025") == "fal charges $0.025; key: found"
    assert values(page.saved(), "KleinFalEdit") != values(wanted, "KleinFalEdit")
    page.turn(FAL, image_size="auto")
    assert values(page.saved(), "KleinFalEdit") == values(wanted, "KleinFalEdit")
    assert "the-secret" not in page("() => document.documentElement.outerHTML")


def test_an_open_request_is_collected_from_the_menu(server, open_page, photo, folder):
    wanted = with_picture(server, photo, "Edit on fal")
    journal = Journal(folder)
    for i, cost in enumerate((0.04, None, 0.08, 0.1)):
        journal.begin(f"print{i}", "endpoint", cost, f"request-{i}")
    journal.begin("lost", "endpoint", 0.04)
    page = open_page(server)
    page.load(wanted)
    text = until(page, "not collected")
    lines = text.split("\n")
    assert lines[1] == "Paid and not collected: 5 at fal, the newest 0 min old. Right-click this node to collect:"
    assert lines[2:] == ["no id, 0 min old, $0.04", "request-3, 0 min old, $0.10", "request-2, 0 min old, $0.08", "..."]
    page.menu(FAL)
    page.choose("Collect a request from fal", "request-2, 0 min old, $0.08")
    assert until(page, "Collects").startswith("Collects request-2 from fal: nothing is submitted or charged; ")
    prompt = page("async () => (await window.app.graphToPrompt()).output")
    assert [one["inputs"]["recover_request_id"] for one in prompt.values() if one["class_type"] == "KleinFalEdit"] == [
        "request-2"
    ]
