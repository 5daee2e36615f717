"""API-format graphs of the tests on a real ComfyUI, and the tensors that go in and out of them."""

from __future__ import annotations

import json
import urllib.error
from urllib.parse import quote

import pytest
from comfy_host import ROOT, Failed
from klein_cns.sampler import CNSParams
from klein_cns.weights.components import WANTED
from safetensors.torch import load_file, save_file

SINGLE = {
    name: WANTED[kind].sources[0][0]
    for name, kind in (("diffusion_model", "transformer"), ("text_encoder", "text_encoder"), ("vae", "vae"))
}
FOLDER = {
    "diffusion_model": "diffusers/tiny-klein/transformer",
    "text_encoder": "diffusers/tiny-klein/text_encoder",
    "vae": "diffusers/tiny-klein/vae",
}
EXAMPLES = ROOT / "example_workflows"
OFF = CNSParams(enable_cns=False)


def graph(name, params=OFF, images=(), loader=SINGLE, sampler=None, conditioner=None, decode=None):
    """Loader, conditioner, sampler, decode and a float save, as an API-format graph."""
    loads = {f"load{i}": node("ProbeLoad", name=picture) for i, picture in enumerate(images)}
    sockets = {f"images.image_{i}": [f"load{i}", 0] for i in range(len(images))}
    return {
        **loads,
        "loader": node("KleinBaseLoader", **{"weight_dtype": "default", "text_encoder_device": "default", **loader}),
        "edit": node(
            "KleinEditConditioner",
            **{"clip": ["loader", 1], "vae": ["loader", 2], "prompt": "make it blue", "negative_prompt": "",
               "image_size": "auto", "width": 96, "height": 64, "num_images": 1, "reference_megapixels": 1.0,
               **sockets, **(conditioner or {})},
        ),
        "sample": node(
            "CNSKSampler",
            **{"model": ["loader", 0], "positive": ["edit", 0], "negative": ["edit", 1], "latent_image": ["edit", 2],
               "seed": 5, "steps": 4, "cfg": 5.0, "solver": "euler", "scheduler": "flux2", "denoise": 1.0,
               **cns_values(params), **(sampler or {})},
        ),
        "decode": node("KleinDecode", **{"latent": ["sample", 0], "vae": ["loader", 2], **(decode or {})}),
        "save": node("ProbeSave", name=name, image=["decode", 0]),
    }  # fmt: skip


def latents(name, **how):
    """The same graph without decoder, saving the sampler's LATENT; a small text-to-image run unless told."""
    how = {"conditioner": {"image_size": "custom"}, **how}
    prompt = graph(name, **how)
    del prompt["decode"]
    return prompt | {"save": node("ProbeSave", name=name, latent=["sample", 0])}


def custom_sampling(name, params, solver="euler", cns_seed=-1, noise=None, sigmas=None, latent=("edit", 2), **how):
    """CNSSampler in SamplerCustomAdvanced, in place of CNSKSampler."""
    prompt = latents(name, params=params, **how)
    del prompt["sample"]
    return prompt | {
        "cns": node("CNSSampler", solver=solver, cns_seed=cns_seed, **cns_values(params, switch=False)),
        "guider": node("CFGGuider", model=["loader", 0], positive=["edit", 0], negative=["edit", 1], cfg=5.0),
        "noise": noise or node("RandomNoise", noise_seed=5),
        "sigmas": sigmas or node("Flux2Scheduler", steps=4, width=96, height=64),
        "sample": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["cns", 0],
            sigmas=["sigmas", 0], latent_image=list(latent),
        ),
    }  # fmt: skip


def example(name):
    """The API-format twin of an example workflow."""
    return json.loads((EXAMPLES / "api" / f"{name}.json").read_text())


def shortened(prompt):
    """An example with fewer steps and small pictures, and otherwise as it stands."""
    for one in prompt.values():
        if "steps" in one["inputs"]:
            one["inputs"]["steps"] = 2
        if one["class_type"] == "KleinEditConditioner" and one["inputs"]["image_size"] != "auto":
            one["inputs"] |= {"image_size": "custom", "width": 96, "height": 64}
    return prompt


def cns_values(params, switch=True):
    values = {"cns_gamma_file": "sit_xl2_unguided", **params.to_request()}
    return {name: value for name, value in values.items() if switch or name != "enable_cns"}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def give(server, name, tensor):
    """Put a tensor (IMAGE [B, H, W, 3], MASK [B, H, W] or samples) where ProbeLoad finds it."""
    save_file({"tensor": tensor.contiguous()}, server.base / "input" / f"{name}.safetensors")


def made(server, name):
    """What ProbeSave wrote."""
    return load_file(server.base / "output" / f"{name}.safetensors")["tensor"]


def result(server, prompt):
    """Run a graph, and what its node ``save`` wrote."""
    server.run(prompt)
    return made(server, prompt["save"]["inputs"]["name"])


def failure(server, prompt):
    """The sentence that a user reads: the server's own refusal of the graph, or a type that prints without a path."""
    with pytest.raises(Failed) as error:
        server.run(prompt)
    text = str(error.value)
    assert text.startswith(("{", "ValueError: ", "RuntimeError: ", "torch.OutOfMemoryError: ")), text
    return text


def ask(server, route, **values):
    """The answer of one of the pack's routes."""
    return server.get(f"/klein_cns/{route}?values={quote(json.dumps(values))}")


def refusal(server, route, **values):
    """The sentence of a route that refuses the values."""
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(server, route, **values)
    assert error.value.code == 400
    return json.loads(error.value.read())["error"]
