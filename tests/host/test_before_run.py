"""The routes that say before a run what Multi-Image Edit and Klein on fal will do, by HTTP."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from comfy_graph import ask, give, latents, made, node, refusal
from klein_cns.klein.references import prepare_reference
from klein_cns.remote.journal import NAME, SAVED, Journal

PICTURES = [(1500, 1100), (90, 200)]


@pytest.mark.parametrize("megapixels", [1.0, 0.3])
def test_tokens_are_the_positions_of_the_latents(server, megapixels):
    """Of the references by the pixels that the VAE gets, and of the result by the latent that the node makes."""
    found = ask(server, "edit", image_size="auto", reference_megapixels=megapixels, pictures=PICTURES)
    expected = []
    for width, height in PICTURES:
        padded = prepare_reference(torch.zeros(1, 3, height, width), megapixels).shape
        expected.append(padded[-1] * padded[-2] // 256)
    assert found["references"] == expected
    for i, (width, height) in enumerate(PICTURES):
        give(server, f"before{i}", torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(i)))
    links = {f"images.image_{i}": [f"load{i}", 0] for i in range(2)} | {"image_size": "auto"}
    loads = {f"load{i}": node("ProbeLoad", name=f"before{i}") for i in range(2)}
    prompt = latents("before", conditioner=links | {"reference_megapixels": megapixels}) | loads
    del prompt["sample"]
    prompt["save"] = node("ProbeSave", name="before", latent=["edit", 2])
    server.run(prompt)
    height, width = made(server, "before").shape[-2:]
    assert (found["size"], found["tokens"]) == ([1500, 1100], height * width)
    assert found["together"] == sum(expected) + height * width and found["complete"]


def test_what_is_not_known_is_said_to_be(server):
    found = ask(server, "edit", image_size="auto", pictures=[None, [64, 64]])
    assert found == {"size": None, "tokens": None, "references": [None, 16], "together": 16, "complete": False}
    found = ask(server, "edit", image_size="square", pictures=[None])
    assert (found["size"], found["references"], found["complete"]) == ([512, 512], [None], False)
    assert ask(server, "edit", width=512)["size"] is None
    assert ask(server, "edit", image_size="auto")["size"] == [1024, 768]
    assert ask(server, "edit", image_size="custom", width=100, height=70)["tokens"] == 7 * 5


@pytest.mark.parametrize(
    ("values", "usd", "at_most"),
    [
        ({"image_size": "square_hd"}, 0.02, False),
        ({"image_size": "square_hd", "pictures": [[300, 200]], "num_images": 2}, 0.06, False),
        ({"image_size": "square", "pictures": [None, None], "addresses": 2}, 0.085, False),
        ({"image_size": "custom", "width": 2048, "height": 2048}, 0.08, False),
        ({"image_size": "auto"}, 0.015, False),
        ({"image_size": "auto", "pictures": [[600, 300]]}, 0.04, True),
        ({"image_size": "auto", "pictures": [None]}, 0.1, True),
        ({}, None, False),
    ],
)
def test_the_price_is_two_cents_a_megapixel(server, values, usd, at_most):
    found = ask(server, "price", **values)
    assert found == {"usd": usd if usd is None else pytest.approx(usd), "at_most": at_most}


def test_refusals_are_sentences(server):
    for route in ("edit", "price"):
        assert "list of at most 4 sizes" in refusal(server, route, image_size="auto", pictures=[None] * 5)
        assert "give [width, height]" in refusal(server, route, image_size="auto", pictures=["a"])
        assert "from 1 to 65536" in refusal(server, route, image_size="auto", pictures=[[0, 5]])
        assert "image_size is 'huge'; allowed are auto," in refusal(server, route, image_size="huge")
    assert "reference_megapixels is 9" in refusal(server, "edit", reference_megapixels=9)
    assert "a side must have at least 64" in refusal(server, "edit", image_size="auto", pictures=[[2000, 20]])
    assert "num_images is 5" in refusal(server, "price", image_size="auto", num_images=5)
    assert "5 pictures are given" in refusal(server, "price", image_size="auto", pictures=[None] * 2, addresses=3)


@pytest.fixture
def folder(server):
    """Where the server keeps the journal and the key; it is gone afterwards."""
    folder = server.base / "user" / "__klein_cns"
    assert not folder.exists()
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def test_what_is_open_at_fal_without_secrets(server, folder):
    """Neither key, prompt, path nor fal's own words; and the route leaves the journal as it is."""
    environment = bool(os.environ.get("FAL_KEY"))
    assert ask(server, "fal") == {"key": environment, "open": [], "count": 0, "fault": False}
    (folder / "fal_key").write_text("the-id:the-secret")
    (folder / "fal_key").chmod(0o600)
    journal = Journal(folder)
    for i in range(23):
        row = journal.begin(f"print{i}", "fal-ai/some/endpoint", 0.04, f"request-{i}")
        journal.update(row, row.state, error="the prompt was: a secret wish")
    journal.update(journal.begin("collected", "endpoint", 0.5, "collected"), SAVED, files=("a.png",))
    journal.begin("lost", "endpoint", None)
    before = (folder / NAME).read_bytes()
    found = ask(server, "fal")
    assert (folder / NAME).read_bytes() == before
    assert (found["key"], found["count"], found["fault"], len(found["open"])) == (True, 24, False, 20)
    assert {key for one in found["open"] for key in one} == {"request_id", "age_s", "cost_usd"}
    assert [one["request_id"] for one in found["open"][:2]] == [None, "request-22"]
    assert [one["cost_usd"] for one in found["open"][:2]] == [None, 0.04]
    assert 0 <= found["open"][0]["age_s"] < 300
    text = json.dumps(found)
    assert not [word for word in ("the-secret", "wish", "endpoint", str(server.base)) if word in text]


def test_a_journal_that_cannot_be_read_is_said_without_its_path(server, folder):
    (folder / NAME).write_bytes(b"not a database, " * 100)
    assert ask(server, "fal") == {"key": bool(os.environ.get("FAL_KEY")), "open": [], "count": 0, "fault": True}
