"""The translations of the nodes against the schemas that ComfyUI serves."""

from __future__ import annotations

import re
import urllib.request

import pytest
from translations import LANGUAGES, LOCALES, ROOT, leaves, read

# Inputs and outputs that keep their names: the endpoints, errors and shared recipes say them, or ComfyUI's own locales
# leave them as they are. Every cns_* does too.
KEPT = {
    "enable_cns", "image_size", "num_images", "num_inference_steps", "guidance_scale", "acceleration",
    "enable_safety_checker", "output_format", "sync_mode", "image_urls", "lora_urls", "lora_stack", "upload_loras",
    "max_cost_usd", "max_usd_a_day", "recover_request_id", "resubmit_lost", "on_flagged", "request_id", "cost_usd",
    "clip", "vae", "cfg",
}  # fmt: skip
# English words that are also the word of the field in another language.
SAME = {
    "de": {"CNS KSampler", "latent", "prompt", "scheduler", "seed", "solver"},
    "es": {"CNS KSampler", "local", "prompt"},
    "fr": {"CNS KSampler", "image", "images", "latent", "latent 1", "latent 2", "local", "mode", "prompt"},
    "ko": {"CNS KSampler"},
    "pt-BR": {"CNS KSampler", "local", "prompt"},
    "ru": {"CNS KSampler", "scheduler"},
    "zh-TW": {"CNS KSampler"},
}

# A quoted value, an id, a folder, a class or an acronym, a number.
NAMED = re.compile(r"'\w+'|models/\w+/|[a-z]+_\w*|[A-Z]\w*[A-Z]\w*?(?=s?\b)|\$?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def schemas(server):
    """What /object_info says of this pack's nodes, by node id."""
    info = server.get("/object_info")
    return {key: node for key, node in info.items() if node["python_module"] == "custom_nodes.klein-cns"}


def keeps(name):
    return name in KEPT or name.startswith("cns_")


def english(node):
    """What a schema says, in the form of nodeDefs.json; a name of None may be left out."""
    inputs, outputs = {}, {}
    for name, spec in (node["input"].get("required", {}) | node["input"].get("optional", {})).items():
        assert spec[1].get("tooltip"), f"{node['name']}: {name} has no tooltip"
        label = None if keeps(name) else spec[1].get("display_name") or name
        inputs[name.replace(".", "_")] = {"name": label, "tooltip": spec[1]["tooltip"]}
    for slot, (kind, name, tooltip) in enumerate(
        zip(node["output"], node["output_name"], node["output_tooltips"], strict=True)
    ):
        label = None if name == kind or keeps(name) else name  # ComfyUI translates the name of a type itself
        outputs[str(slot)] = {"name": label, "tooltip": tooltip}
    return {
        "display_name": node["display_name"], "description": node["description"],
        "inputs": inputs, "outputs": outputs,
    }  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_of_the_schemas_is_translated_and_nothing_else(schemas, language):
    source = {key: text for key, text in leaves({key: english(node) for key, node in schemas.items()}).items() if text}
    own = leaves(read(LOCALES / language / "nodeDefs.json"))
    assert set(own) == set(source)
    same = {source[key] for key, text in own.items() if text == source[key]}
    assert same <= SAME.get(language, set())


@pytest.mark.parametrize("language", LANGUAGES)
def test_one_sentence_has_one_translation(schemas, language):
    """Of descriptions and tooltips; one name may stand for inputs of several kinds."""
    found: dict[str, set[str]] = {}
    for key, source, text in pairs(schemas, language):
        if key.endswith((".tooltip", ".description")):
            found.setdefault(source, set()).add(text)
    assert {source: many for source, many in found.items() if len(many) > 1} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_sentence_names_is_named_in_its_translation(schemas, language):
    """Values, ids, folders and numbers as they are; another node by its name in that language."""
    own = read(LOCALES / language / "nodeDefs.json")
    nodes = {node["display_name"]: own[key]["display_name"] for key, node in schemas.items()}
    for key, source, text in pairs(schemas, language):
        if key.endswith((".name", ".display_name")):
            continue
        for name, translated in nodes.items():
            if name in source:
                assert translated in text, f"{key}: {name}"
                source = source.replace(name, "")
        for word in NAMED.findall(source):
            assert word in text or word.replace(".", ",") in text, f"{key}: {word}"


def pairs(schemas, language):
    """(key, English, translation) of every text."""
    source = leaves({key: english(node) for key, node in schemas.items()})
    return [(key, source[key], text) for key, text in leaves(read(LOCALES / language / "nodeDefs.json")).items()]


def test_comfyui_serves_them(server):
    served = server.get("/i18n")
    for language in LANGUAGES:
        own = {"nodeDefs": read(LOCALES / language / "nodeDefs.json"), **read(LOCALES / language / "main.json")}
        for key, value in own.items():
            assert served[language][key] == value, language


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_comfyui_serves_the_help_pages(server, schemas, language):
    for name in schemas:
        page = f"{name}/{language}.md"
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/extensions/klein-cns/docs/{page}") as answer:
            assert answer.read() == (ROOT / "web" / "docs" / page).read_bytes(), page
            assert answer.headers.get_content_type() != "text/html", page  # which the frontend takes for a missing page
