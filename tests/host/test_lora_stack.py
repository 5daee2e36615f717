"""Klein LoRA Stack on a real server: what it applies, reports and refuses."""

from __future__ import annotations

import copy
import json
import os
import time

import pytest
import torch
from comfy_graph import SINGLE, failure, made, node
from klein_cns.klein import tiny
from lora_formats import FORMATS, save, write

NONE = {f"lora_{i}": "none" for i in (1, 2, 3)} | {f"strength_{i}": 1.0 for i in (1, 2, 3)}
SMALL = {"num_inference_steps": 2, "seed": 5, "image_size": (64, 64)}
WRITTEN = ("peft, DoRA", "lora_unet_<BFL> LoHa", "transformer.<diffusers> + alpha")
STRENGTHS = (0.7, -0.4, 1.5)


def stack(**given):
    return node("KleinLoraStack", **{**NONE, "apply": "auto", **given})


def graph(**stacks):
    """Text to image of 64x64 through the stack ``last``; stacks may be chained."""
    return {
        "loader": node("KleinBaseLoader", weight_dtype="default", text_encoder_device="default", **SINGLE),
        **stacks,
        "text": node("CLIPTextEncode", clip=["loader", 1], text="a cat"),
        "nothing": node("CLIPTextEncode", clip=["loader", 1], text=""),
        "latent": node("EmptyFlux2LatentImage", width=64, height=64, batch_size=1),
        "sigmas": node("Flux2Scheduler", steps=2, width=64, height=64),
        "guider": node("CFGGuider", model=["last", 0], positive=["text", 0], negative=["nothing", 0], cfg=5.0),
        "noise": node("RandomNoise", noise_seed=5),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sample": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0],
                       sigmas=["sigmas", 0], latent_image=["latent", 0]),
        "save": node("ProbeSave", name="lora", latent=["sample", 0]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def loras(server, host_pipeline):
    """Three LoRAs in the server's folder, by name, each in another format."""
    names = []
    for i, form in enumerate(WRITTEN):
        sample = write(FORMATS[form], host_pipeline.pipe.transformer.state_dict(), seed=i, size=0.1)
        names.append(f"folder{i}/adapter_model.safetensors" if sample.config else f"lora{i}.safetensors")
        save(sample, server.base / "models" / "loras" / names[-1], {"trigger_word": f"word{i}", "ss_output_name": "me"})
    return names


def path(server, name):
    return server.base / "models" / "loras" / name


SLOTS = [f"{name}_{i}" for i in (1, 2, 3) for name in ("lora", "strength")]


def test_every_input_has_a_tooltip_and_the_model_is_optional(server):
    """So is every input, for a prompt of the API; in the order in which saved workflows have the widgets' values."""
    info = server.get("/object_info/KleinLoraStack")["KleinLoraStack"]
    inputs = info["input"]["optional"]
    assert not info["input"].get("required") and list(inputs) == ["model", *SLOTS, "lora_stack", "apply"]
    assert not [name for name, spec in inputs.items() if not (len(spec) > 1 and spec[1].get("tooltip"))]
    assert info["output"] == ["MODEL", "LORA_STACK"] and inputs["apply"][1]["advanced"]


def test_chained_stacks_are_the_other_hosts_picture_and_are_reported(server, host_pipeline, loras):
    """Three LoRAs over two stacks; the same edit as `KleinPipeline` with the same three."""
    chained = graph(
        first=stack(lora_2=loras[0], strength_2=STRENGTHS[0]),
        last=stack(
            model=["loader", 0], lora_stack=["first", 1], lora_1=loras[1], strength_1=STRENGTHS[1], lora_3=loras[2],
            strength_3=STRENGTHS[2],
        ),
    )  # fmt: skip
    outputs = server.run(chained)["outputs"]
    reports = outputs["last"]["klein_loras"]
    assert [report["file"] for report in reports] == loras
    assert [report["strength"] for report in reports] == list(STRENGTHS)
    assert [(report["applied"], report["total"]) for report in reports] == [(39, 39), (31, 31), (39, 39)]
    assert reports[0]["trigger_words"] == "word0" and reports[1]["training"] == {"ss_output_name": "me"}
    assert "39 of 39 modules apply, 39 merged" in outputs["last"]["text"][0]
    assert outputs["first"]["text"] == [f"{loras[0]} at 0.7: passed on, no model is connected"]
    host_pipeline.set_loras([(str(path(server, name)), s) for name, s in zip(loras, STRENGTHS, strict=True)])
    expected = host_pipeline("a cat", negative_prompt="", guidance_scale=5.0, **SMALL).latents
    host_pipeline.set_loras([])
    plain = host_pipeline("a cat", negative_prompt="", guidance_scale=5.0, **SMALL).latents
    assert float((expected - plain).abs().max()) > 0.05
    assert float((made(server, "lora") - expected).abs().max()) <= 1e-3


def test_bypass_is_merge_and_leaves_nothing_behind(server, loras):
    """One run after the other on one loaded model, strengths changed in between."""
    both = {"model": ["loader", 0], "lora_1": loras[1], "lora_2": loras[2]}
    results = {}
    for apply in ("merge", "bypass"):
        for strength in (1.0, 0.5, 0.0):
            server.run(graph(last=stack(**both, strength_1=strength, strength_2=strength, apply=apply)))
            results[apply, strength] = made(server, "lora")
    assert float((results["merge", 1.0] - results["merge", 0.5]).abs().max()) > 0.01
    for strength in (1.0, 0.5):
        assert float((results["merge", strength] - results["bypass", strength]).abs().max()) <= 1e-4
    assert torch.equal(results["merge", 0.0], results["bypass", 0.0])


def test_beside_comfyuis_own_loader(server, loras):
    """In either order; a file in a format that it reads whole."""
    own = write(FORMATS["lora_unet_<BFL>"], tiny().transformer.state_dict(), seed=7, size=0.1)
    save(own, path(server, "own.safetensors"))
    before = graph(
        own=node("LoraLoaderModelOnly", model=["loader", 0], lora_name="own.safetensors", strength_model=0.5),
        last=stack(model=["own", 0], lora_1=loras[0]),
    )
    server.run(before)
    results = [made(server, "lora")]
    after = copy.deepcopy(before)
    after["own"]["inputs"]["model"] = ["stack", 0]
    after["stack"] = stack(model=["loader", 0], lora_1=loras[0])
    after["last"] = after.pop("own")
    after["last"]["inputs"]["model"] = ["stack", 0]
    server.run(after)
    results.append(made(server, "lora"))
    alone = graph(last=stack(model=["loader", 0], lora_1=loras[0], lora_2="own.safetensors", strength_2=0.5))
    server.run(alone)
    assert float((results[0] - results[1]).abs().max()) <= 1e-4
    assert float((results[0] - made(server, "lora")).abs().max()) <= 1e-4


def test_refusals_are_sentences(server, loras):
    folder = server.base / "models" / "loras"
    (folder / "bad.safetensors").write_bytes(b"\xff" * 64)
    (server.base / "models" / "outside.safetensors").write_bytes(b"x")
    four = {f"lora_{i + 1}": name for i, name in enumerate(loras)}
    ready = {"model": ["loader", 0]}
    cases = [
        (stack(**ready, lora_1="gone.safetensors"), "'gone.safetensors' does not exist; put it into models/loras/"),
        (stack(lora_1="gone.safetensors"), "'gone.safetensors' does not exist"),
        (stack(**ready, lora_1="../outside.safetensors"), "lies outside models/loras/"),
        (stack(**ready, lora_1="..\\\\outside.safetensors"), "lies outside models/loras/"),
        (stack(**ready, lora_1=str(path(server, loras[0]))), "lies outside models/loras/"),
        *(
            (stack(**ready, lora_1=name), "lies outside models/loras/")
            for name in (
                "C:/lora1.safetensors",
                "c:lora1.safetensors",
                "C:\\lora1.safetensors",
                "folder0/C:/lora1.safetensors",
                "folder0\\d:lora1.safetensors",
                "//host/share/lora1.safetensors",
                "\\\\?\\C:\\lora1.safetensors",
            )
        ),
        (stack(**ready, lora_1=7), "lora_1 is 7; give the name of a file in models/loras/, or none"),
        (stack(**ready, lora_1="bad.safetensors"), "LoRA bad.safetensors is not a safetensors file"),
        (stack(**ready, lora_1=loras[0], strength_1=float("nan")), "strength_1 is nan; it must be a finite number"),
        (stack(**ready, lora_stack=["other", 1], **four), "4 LoRAs are stacked"),
        (stack(model=["other", 0], lora_1=loras[1], lora_2=loras[2], lora_3=loras[1]), "4 LoRAs are stacked"),
        (stack(model=["other", 0], lora_stack=["other", 1]), "is on the model already"),
        (stack(**ready, lora_1=loras[0], apply="bypass"), "apply is bypass, but a LoRA has a DoRA"),
        (stack(lora_1=loras[0]), "the model output is used, but no model is connected"),
    ]
    for last, says in cases:
        text = failure(server, graph(other=stack(**ready, lora_1=loras[0]), last=last))
        assert says in text, text


def test_a_file_that_changed_is_read_again(server, loras):
    """Under the same name, without any change of the graph."""
    prompt = graph(last=stack(model=["loader", 0], lora_1="trained.safetensors"))
    results = []
    for seed in (1, 2):
        sample = write(FORMATS["diffusion_model.<BFL>"], tiny().transformer.state_dict(), seed=seed, size=0.1)
        save(sample, path(server, "trained.safetensors"))
        os.utime(path(server, "trained.safetensors"), (time.time(), 1_000_000 + seed))
        server.run(prompt)
        results.append(made(server, "lora"))
    assert not torch.allclose(results[0], results[1], atol=1e-3)


@pytest.mark.parametrize("absent", [None, "None", "none", "NONE", "", "  ", " none\t", "no key"])
def test_an_absent_lora_of_a_prompt_of_the_api_is_none(server, loras, absent):
    given = {"lora_1": absent, "strength_1": 0.5, "lora_2": loras[1], "strength_2": 0.25, "lora_3": absent}
    if absent == "no key":
        given = {"lora_2": loras[1], "strength_2": 0.25}
    prompt = {"last": node("KleinLoraStack", **given), "show": node("ProbeStack", stack=["last", 1])}
    assert server.run(prompt)["outputs"]["show"]["stack"] == [[loras[1], 0.25, 0.25]]
    given["lora_2"] = absent if absent != "no key" else None
    outputs = server.run(graph(last=node("KleinLoraStack", model=["loader", 0], **given)))["outputs"]
    assert outputs["last"]["text"] == ["no LoRA is chosen"] and outputs["last"]["klein_loras"] == []


def test_a_prompt_may_leave_out_what_is_as_the_node_has_it(server, loras):
    """The strength is 1 then, and apply is auto."""
    outputs = server.run(graph(last=node("KleinLoraStack", model=["loader", 0], lora_3=loras[1])))["outputs"]
    (report,) = outputs["last"]["klein_loras"]
    assert (report["file"], report["strength"], report["how"]) == (loras[1], 1.0, "31 merged")
    bare = {"last": node("KleinLoraStack"), "show": node("ProbeStack", stack=["last", 1])}
    assert server.run(bare)["outputs"]["show"]["stack"] == []


def test_no_model_is_loaded_for_a_stack_alone(server, loras):
    """What a remote run needs: the entries as the community's type has them."""
    prompt = {"last": stack(lora_1=loras[0], strength_1=0.25), "show": node("ProbeStack", stack=["last", 1])}
    assert server.run(prompt)["outputs"]["show"]["stack"] == [[loras[0], 0.25, 0.25]]


def test_stacks_of_other_packs(server, loras):
    for entries, says in (
        ([[loras[1], 0.5, 0.0]], None),
        ([["gone.safetensors", 1, 1]], "does not exist"),
        ([["../outside.safetensors", 1, 1]], "lies outside"),
        ([[loras[1], float("inf"), 1]], "must be a finite number"),
        ([loras[1]], "allowed are (name, strength_model, strength_clip)"),
        ("text", "must be a list of LoRAs"),
    ):
        given = node("ProbeGive", entries=json.dumps(entries))
        prompt = graph(given=given, last=stack(model=["loader", 0], lora_stack=["given", 0]))
        if says is None:
            report = server.run(prompt)["outputs"]["last"]["klein_loras"][0]
            assert (report["file"], report["strength"]) == (loras[1], 0.5)
        else:
            assert says in failure(server, prompt)
