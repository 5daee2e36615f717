"""The nodes on a real ComfyUI server, through /prompt, as a user's graph reaches them."""

from __future__ import annotations

import copy
import json
import urllib.error

import pytest
import torch
from comfy_graph import FOLDER, OFF, SINGLE, failure, give, graph, latents, made, node, result
from comfy_host import ROOT
from klein_cns.klein.references import to_image, to_pixels
from klein_cns.sampler import CNSParams
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def pictures(server, photo):
    """Two pictures on the server, and the same as PIL images."""
    images = [photo.crop((100, 50, 211, 123)), photo.crop((0, 0, 64, 96))]
    for i, image in enumerate(images):
        give(server, f"picture{i}", to_pixels(image).movedim(1, -1))
    return images


def test_every_node_is_there_with_a_tooltip_on_every_input(server):
    for name in sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md")):
        info = server.get(f"/object_info/{name}")[name]
        inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
        missing = [key for key, spec in inputs.items() if not (len(spec) > 1 and spec[1].get("tooltip"))]
        assert not missing, (name, missing)


@pytest.mark.parametrize(
    ("solver", "cns"),
    [("euler", OFF), ("sde_2m", OFF), ("euler", CNSParams()), ("sde_2m", CNSParams(gamma_source="reference"))],
)
@pytest.mark.parametrize("guidance", [5.0, 1.0, 0.5])
def test_parity_with_the_diffusers_host(server, host_pipeline, pictures, solver, cns, guidance):
    server.run(graph("parity", cns, ["picture0", "picture1"], sampler={"cfg": guidance, "solver": solver}))
    expected = host_pipeline(
        "make it blue", pictures, num_inference_steps=4, seed=5, guidance_scale=guidance, solver=solver, cns=cns
    ).pixels
    found = made(server, "parity").movedim(-1, 1)
    assert found.shape == expected.shape == (1, 3, 73, 111)
    assert float((found - expected).abs().max()) <= 1e-3


def test_a_diffusers_folder_is_the_single_files(server, pictures):
    server.run(graph("single", CNSParams(), ["picture0"]))
    server.run(graph("folder", CNSParams(), ["picture0"], loader=FOLDER))
    assert float((made(server, "single") - made(server, "folder")).abs().max()) <= 1e-4


def test_text_to_image_in_every_size(server):
    for conditioner, shape in (
        ({"image_size": "custom", "width": 100, "height": 65, "num_images": 2}, (2, 65, 100, 3)),
        ({"image_size": "square"}, (1, 512, 512, 3)),
    ):
        server.run(graph("size", OFF, conditioner=conditioner, sampler={"steps": 1, "cfg": 1.0}))
        assert tuple(made(server, "size").shape) == shape


def test_a_masked_edit_keeps_every_pixel_outside(server, pictures):
    original = load_file(server.base / "input" / "picture0.safetensors")["tensor"]
    mask = torch.zeros(1, *original.shape[1:3])
    mask[:, 20:60, 30:90] = 1
    give(server, "mask", mask)
    prompt = graph(
        "masked",
        CNSParams(),
        ["picture0"],
        conditioner={"mask": ["mask", 1]},
        decode={"original": ["load0", 0], "mask": ["mask", 1]},
    )
    prompt["mask"] = node("ProbeLoad", name="mask")
    server.run(prompt)
    edited = made(server, "masked")
    assert torch.equal(edited[mask == 0], original[mask == 0])
    assert not torch.allclose(edited[0, 35:45, 50:70], original[0, 35:45, 50:70], atol=0.05)


def test_an_original_without_a_mask_keeps_nothing_of_it(server, pictures):
    """A blueprint's picture is connected to the decoder whether there is a mask or not."""
    for name, decode in (("plain", None), ("unmasked", {"original": ["load0", 0]})):
        server.run(graph(name, OFF, ["picture0"], sampler={"steps": 1}, decode=decode))
    assert torch.equal(made(server, "plain"), made(server, "unmasked"))


@pytest.mark.parametrize("box", [(17, 22, 17, 22), (0, 64, 40, 46), (24, 41, 8, 80)], ids=["dot", "stroke", "band"])
def test_every_latent_cell_that_a_mask_touches_may_change(server, photo, box):
    """Counted over two seeds: also where a thin stroke misses the middle of a cell."""
    top, bottom, left, right = box
    mask = torch.zeros(1, 64, 96)
    mask[:, top:bottom, left:right] = 1
    touched = torch.nn.functional.max_pool2d(mask, 16)[0] > 0
    give(server, f"box{top}", mask)
    give(server, "scene", to_pixels(photo.resize((96, 64))).movedim(1, -1))
    masked = {"images.image_0": ["scene", 0], "mask": ["mask", 1], "image_size": "auto"}
    nodes = {"scene": node("ProbeLoad", name="scene"), "mask": node("ProbeLoad", name=f"box{top}")}
    first, second = (
        result(server, latents(f"seed{seed}", params=CNSParams(), conditioner=masked, sampler={"seed": seed}) | nodes)
        for seed in (1, 2)
    )
    assert torch.equal((first != second).any(1)[0], touched)


def test_a_masked_edit_of_a_picture_over_2048(server, photo):
    """It is scaled, and so are original and mask in the decoder."""
    give(server, "wide", to_pixels(photo.resize((2100, 80))).movedim(1, -1))
    mask = torch.zeros(1, 80, 2100)
    mask[:, 20:60, 300:500] = 1
    give(server, "wide_mask", mask)
    prompt = graph(
        "wide", images=["wide"], conditioner={"mask": ["mask", 1]}, sampler={"steps": 1, "cfg": 1.0},
        decode={"original": ["load0", 0], "mask": ["mask", 1]},
    ) | {"mask": node("ProbeLoad", name="wide_mask")}  # fmt: skip
    edited = result(server, prompt)
    assert edited.shape == (1, 78, 2048, 3)
    original = to_pixels(photo.resize((2100, 80)).resize((2048, 78))).movedim(1, -1)
    change = (edited - original).abs()
    assert float(change[:, :, 600:].max()) < 0.1 < float(change[:, 30:50, 320:460].max())


def test_the_picture_sockets_are_fixed_and_count_from_one(server):
    """On both nodes; their ids are those that files were saved with."""
    for name in ("KleinEditConditioner", "KleinFalEdit"):
        inputs = server.get(f"/object_info/{name}")[name]["input"]["optional"]
        labels = {key: spec[1]["display_name"] for key, spec in inputs.items() if spec[0] == "IMAGE"}
        assert labels == {f"images.image_{i}": f"picture {i + 1}" for i in range(4)}


def test_pictures_count_in_socket_order(server, photo):
    """Gaps are skipped, a batch counts each of its pictures, and another order makes another picture. Where the prompt
    counts otherwise than the sockets, the node says so."""
    pair = [to_pixels(photo.crop((left, 50, left + 96, 114))).movedim(1, -1) for left in (10, 200)]
    give(server, "one", pair[0])
    give(server, "two", pair[1])
    give(server, "both", torch.cat(pair))

    entry = {}

    def run(name, *sockets):
        names = {f"load{i}": node("ProbeLoad", name=picture) for i, (_, picture) in enumerate(sockets)}
        links = {f"images.image_{socket}": [f"load{i}", 0] for i, (socket, _) in enumerate(sockets)}
        entry.update(server.run(latents(name, conditioner=links, sampler={"steps": 1}) | names))
        return made(server, name)

    def said():
        return entry["outputs"]["edit"]["text"]

    expected = run("expected", (0, "one"), (1, "two"))
    assert said() == []
    assert torch.equal(run("gap", (3, "two"), (1, "one")), expected)
    [text] = said()
    assert "picture 1 of the prompt is at the socket picture 2; " in text
    assert text.endswith(" picture 2 of the prompt is at the socket picture 4.")
    assert torch.equal(run("batch", (0, "both")), expected)
    [text] = said()
    assert text.endswith(": picture 2 of the prompt is at the socket picture 1.")
    assert not torch.allclose(run("swapped", (0, "two"), (1, "one")), expected, atol=1e-3)


def test_encodings_are_kept(server):
    """Changing only the prompt encodes no picture again, changing only a picture no text."""
    for i in range(2):  # pictures of this test alone: those that others gave are kept too
        give(server, f"counted{i}", torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(50 + i)))
    prompt = graph("counted", OFF, ["counted0"], sampler={"steps": 1})
    prompt["count"] = node("ProbeCount", clip=["loader", 1], vae=["loader", 2])
    prompt["edit"]["inputs"] |= {"clip": ["count", 0], "vae": ["count", 1], "prompt": "first words"}
    prompt["report"] = node("ProbeReport", after=["edit", 2])

    def counts(changed):
        return server.run(changed)["outputs"]["report"]["counts"][0]

    first = counts(prompt)
    for i in range(12):  # small ones are all kept
        other = copy.deepcopy(prompt)
        other["edit"]["inputs"]["prompt"] = f"words {i}"
        last = counts(other)
    assert last["text"] == first["text"] + 12
    assert counts(prompt) == last
    first = last
    other_text = copy.deepcopy(prompt)
    other_text["edit"]["inputs"]["prompt"] = "other words"
    second = counts(other_text)
    assert second == {"text": first["text"] + 1, "picture": first["picture"]}
    other_picture = copy.deepcopy(other_text)
    other_picture["load0"]["inputs"]["name"] = "counted1"
    assert counts(other_picture) == {"text": second["text"], "picture": second["picture"] + 1}


def test_a_pack_that_changes_a_conditioning_spoils_no_later_run(server, pictures):
    prompt = graph("before", OFF, ["picture0"], sampler={"steps": 1}, conditioner={"prompt": "to be spoiled"})
    expected = result(server, prompt)
    spoiled = copy.deepcopy(prompt)
    for side, output in (("positive", 0), ("negative", 1)):
        spoiled[side] = node("ProbeSpoil", conditioning=["edit", output])
        spoiled["sample"]["inputs"][side] = [side, 0]
    for i, seed in enumerate((6, 7)):  # the second run takes the encodings from the cache
        again = copy.deepcopy(spoiled)
        again["edit"]["inputs"]["num_images"] = 1 + i
        again["sample"]["inputs"]["seed"] = seed
        server.run(again)
    fresh = copy.deepcopy(prompt)
    fresh["edit"]["inputs"]["width"] = 100  # which auto leaves aside; the node runs again and asks the cache
    assert torch.equal(result(server, fresh), expected)


def test_out_of_memory_says_what_to_lower(server):
    prompt = latents("hungry", params=CNSParams())
    prompt["hungry"] = node("ProbeHungry", model=["loader", 0])
    prompt["sample"]["inputs"]["model"] = ["hungry", 0]
    sentence = failure(server, prompt)
    assert "memory ran out (" in sentence and "lower the size or the number of the pictures" in sentence
    assert bool(result(server, latents("fed", params=CNSParams(), sampler={"seed": 31})).isfinite().all())


def test_cns_off_is_the_official_chain_bit_for_bit(server, pictures):
    prompt = graph("official", OFF, ["picture0"])
    prompt |= {
        "sigmas": node("Flux2Scheduler", steps=4, width=112, height=80),
        "guider": node("CFGGuider", model=["loader", 0], positive=["edit", 0], negative=["edit", 1], cfg=5.0),
        "noise": node("RandomNoise", noise_seed=5),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "advanced": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["edit", 2],
        ),
        "save": node("ProbeSave", name="ours", latent=["sample", 0]),
        "save2": node("ProbeSave", name="theirs", latent=["advanced", 0]),
    }
    server.run(prompt)
    assert torch.equal(made(server, "ours"), made(server, "theirs"))


def test_refusals_are_sentences(server, pictures):
    for name, tensor in (
        ("nothing", torch.zeros(1, 64, 96)), ("masks", torch.ones(3, 73, 111)), ("flat", torch.ones(1, 64, 96, 1)),
        ("foreign", torch.ones(1, 16, 8, 12)),
    ):  # fmt: skip
        give(server, name, tensor)
    others = {name: node("ProbeLoad", name=name) for name in ("masks", "foreign")}
    others |= {"mask": node("ProbeLoad", name="nothing"), "pixels": node("VAELoader", vae_name="pixel_space")}
    for change, says in (
        ({"loader": {**SINGLE, "diffusion_model": "gone.sft"}}, ["'gone.sft' does not", "klein-base-9b"]),
        ({"loader": {**SINGLE, "vae": "diffusers/../../x"}}, ["does not exist", "FLUX.2's VAE"]),
        ({"images": ["picture0"] * 4, "conditioner": {"images.image_4": ["load0", 0]}}, ["5 pictures are"]),
        ({"params": CNSParams(gamma_source="reference")}, ["needs at least one reference picture"]),
        ({"params": CNSParams(), "sampler": {"cns_gamma_file": "gone.pt"}}, ["'gone.pt' does not exist; put it into"]),
        ({"decode": {"mask": ["mask", 1]}}, ["mask is connected but original is not"]),
        ({"images": ["picture0"], "conditioner": {"images.picture": ["load0", 0]}}, ["'images.picture' is unknown"]),
        ({"images": ["flat"]}, ["picture 1 is [1, 64, 96, 1]; a picture is [batch, height, width, 3 or 4 channels]"]),
        ({"images": ["picture0"], "conditioner": {"mask": ["masks", 1]}}, ["mask holds 3 masks; connect the one"]),
        ({"sampler": {"latent_image": ["foreign", 2]}}, ["latent_image has 16 channels, the model takes 128"]),
        ({"decode": {"latent": ["foreign", 2]}}, ["latent has 16 channels, FLUX.2's have 128"]),
        ({"images": ["picture0"], "conditioner": {"vae": ["pixels", 0]}}, ["encodes to has 3 channels, FLUX.2's"]),
        ({"conditioner": {"mask": ["mask", 1]}}, ["a mask is connected but no picture"]),
    ):
        prompt = graph("refused", **{"params": OFF, **change}) | others
        text = failure(server, prompt)
        assert all(part in text for part in says), text


def test_the_server_log_has_no_traceback_of_the_pack_at_start(server):
    log = server.log.read_text()
    assert "could not be imported" not in log and "IMPORT FAILED" not in log
    with pytest.raises(urllib.error.HTTPError):
        server.get("/klein_cns")  # no route of our own


def test_pictures_saved_by_the_graph_are_what_was_made(server, pictures):
    entry = server.run(graph("plain", OFF, ["picture0"], sampler={"steps": 1}))
    assert entry["status"]["status_str"] == "success"
    assert to_image(made(server, "plain")[0].movedim(-1, 0)).size == pictures[0].size
    assert json.dumps(entry["prompt"][2]).count("make it blue") == 1
