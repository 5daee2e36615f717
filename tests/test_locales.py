"""The translations as files: their form, the words of the browser's modules, and the help pages.

What they say of the nodes is compared with the schemas in host/test_locales.py.
"""

from __future__ import annotations

import json
import re
from itertools import groupby

import pytest
from translations import LANGUAGES, LOCALES, ROOT, leaves, read

HELP = ("ja", "zh")
WORDS = ROOT / "web" / "words.js"
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))


def english_words():
    """The texts of ENGLISH in words.js by their keys."""
    block = re.search(r"^const ENGLISH = \{\n(.*?)^\};", WORDS.read_text(encoding="utf-8"), re.M | re.S)[1]
    found = re.findall(r'^  (\w+):\s+("(?:[^"\\]|\\.)*"),$', block, re.M)
    assert len(found) == len(re.findall(r"^  \w+:", block, re.M)), "a text of ENGLISH is not one string"
    return {key: json.loads(text) for key, text in found}


def placeholders(text):
    return sorted(re.findall(r"\{\w*\}", text))


def test_every_language_has_the_same_files_with_the_same_keys():
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)
    first, *others = ({path.name: set(leaves(read(path))) for path in (LOCALES / one).iterdir()} for one in LANGUAGES)
    assert {"main.json", "nodeDefs.json"} <= set(first) <= {"main.json", "nodeDefs.json", "settings.json"}
    for language, other in zip(LANGUAGES[1:], others, strict=True):
        assert other == first, language


@pytest.mark.parametrize("path", sorted(LOCALES.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_is_utf8_sorted_and_has_no_empty_text(path):
    found = read(path)
    stable = json.dumps(found, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    assert path.read_bytes() == stable.encode("utf-8")
    for key, text in leaves(found).items():
        assert isinstance(text, str) and text and text == text.strip(), key
        if path.stem != "main":
            assert not re.search(r"[{}@|]", text), f"{key}: ComfyUI's frontend reads this character as a command"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_words_of_the_browser_are_all_there_with_their_values(language):
    english, own = english_words(), read(LOCALES / language / "main.json")["kleinCns"]
    assert set(own) == set(english)
    for key, text in own.items():
        assert placeholders(text) == placeholders(english[key]), key
        assert text != english[key], key


def test_the_category_is_not_translated():
    """The browser's modules know the pack's nodes by it, and ComfyUI hands them the translated one."""
    for language in LANGUAGES:
        assert set(read(LOCALES / language / "main.json")) == {"kleinCns"}, language


def test_the_settings_of_the_browser_are_all_there():
    modules = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.js")))
    settings = {found.replace(".", "_") for found in re.findall(r'\bid: "([\w.-]+\.[\w.-]+)"', modules)}
    for language in LANGUAGES:
        path = LOCALES / language / "settings.json"
        assert set(read(path) if path.exists() else {}) == settings, language


@pytest.mark.parametrize("language", HELP)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_help_page_is_translated_whole(page, language):
    """Paragraph for paragraph and item for item, with everything that is typed, linked or named as it is."""
    english = page.read_text(encoding="utf-8")
    own = (page.with_suffix("") / f"{language}.md").read_text(encoding="utf-8")
    assert form(own) == form(english)
    for pattern in (r"`[^`]+`", r"\]\((.+?)\)", r"\$\d[\d.]*"):
        assert sorted(re.findall(pattern, own)) == sorted(re.findall(pattern, english)), pattern
    assert not re.search(r"[A-Za-z]+(?: [a-z]+){5}", re.sub(r"`[^`]+`", "", own)), "a sentence is still English"


def form(page):
    """The kinds of a page's blocks, in order: headings, items, paragraphs."""
    lines = [line for line in page.splitlines() if not line.startswith("  ")]
    kinds = ["" if not line else line[0] if line[0] in "#-" else "text" for line in lines]
    return [kind for kind, run in groupby(kinds) if kind for _ in (run if kind == "-" else [0])]


def test_no_help_page_is_left_over():
    known = {page.stem for page in PAGES}
    for path in (ROOT / "web" / "docs").glob("*/*"):
        assert path.parent.name in known and path.name in {f"{language}.md" for language in HELP}, path
