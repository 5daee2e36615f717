"""The nodes in a user's language, in both renderers."""

from __future__ import annotations

import json

import pytest
from comfy_graph import EXAMPLES
from translations import LOCALES, read

pytestmark = pytest.mark.usefixtures("playwright")  # before a server is started for it
# [type, title, {input: what is shown}, {output: ...}, {widget: ...}] of each node; a slot shows the first that it has
SHOWN = """() => window.app.graph._nodes.map((node) => {
    const slots = (all) => (all ?? []).map((one) => [one.name, one.label || one.localized_name || one.name]);
    return [node.type, node.title, Object.fromEntries(slots(node.inputs.filter((one) => !one.widget))),
            slots(node.outputs), Object.fromEntries(slots(node.widgets))];
})"""
SAVED_LABELS = """() => window.app.graph.serialize().nodes.flatMap((node) => node.inputs ?? [])
    .filter((input) => input.name.startsWith("images.")).map(({ label }) => label ?? null)"""


def example():
    return json.loads((EXAMPLES / "Edit with four pictures and LoRAs.json").read_text())


@pytest.fixture
def speak(server):
    """A function that sets the language of the pages that are opened next."""
    yield lambda language: server.post("/settings", {"Comfy.Locale": language})
    server.post("/settings", {"Comfy.Locale": "en"})


@pytest.mark.parametrize("language", ["ja", "ru"])
def test_the_nodes_speak_the_users_language(server, open_page, speak, language):
    """Titles, sockets, outputs and widgets; what has no translation keeps its name."""
    speak(language)
    page = open_page(server)
    page.load(example())
    nodes = read(LOCALES / language / "nodeDefs.json")
    seen = [one for one in page(SHOWN) if one[0] in nodes]
    assert len(seen) == 5
    for kind, title, sockets, outputs, widgets in seen:
        own = nodes[kind]
        assert title == own["display_name"]
        for name, shown in (sockets | widgets).items():
            entry = own["inputs"].get(name.replace(".", "_"))
            if entry is not None:  # the frontend adds widgets of its own
                assert shown == entry.get("name", name), f"{kind}: {name}"
        for slot, (name, shown) in enumerate(outputs):
            entry = own.get("outputs", {}).get(str(slot), {})
            if "name" in entry:
                assert shown == entry["name"], f"{kind}: {name}"
    if page("() => document.querySelector('[data-node-id]') !== null"):  # Nodes 2.0 draws with elements
        text = page.text()
        edit, loras = nodes["KleinEditConditioner"], nodes["KleinLoraStack"]
        for shown in (
            edit["display_name"],
            edit["inputs"]["images_image_1"]["name"],
            loras["inputs"]["strength_2"]["name"],
        ):
            assert shown in text


def test_a_picture_socket_that_was_saved_in_another_language_has_its_name(server, open_page, speak):
    """No language's label is saved; one that the user gave is, and stays."""
    speak("ja")
    page = open_page(server)
    page.load(example())
    assert page(SAVED_LABELS) == [None] * 4
    page("() => { window.app.graph._nodes.find(({ type }) => type === 'KleinEditConditioner').inputs"
         ".find(({ name }) => name === 'images.image_2').label = 'her coat'; }")  # fmt: skip
    saved = page.saved()
    speak("en")
    page.reload()
    page.load(saved)
    assert page(SAVED_LABELS) == ["picture 1", "picture 2", "her coat", "picture 4"]


def test_the_words_of_the_browsers_modules_are_the_users(server, open_page, speak):
    speak("ja")
    page = open_page(server)
    own = read(LOCALES / "ja" / "main.json")["kleinCns"]
    said = page("""async (keys) => {
        const words = await import("/extensions/klein-cns/words.js");
        await words.loadWords();
        return keys.map((key) => words.say(key));
    }""", list(own))  # fmt: skip
    assert dict(zip(own, said, strict=True)) == own
