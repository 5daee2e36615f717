"""Acceleration on a real ComfyUI: calls, both hosts, other packs' guiders, patches, caches and masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfy_graph import OFF, custom_sampling, failure, give, latents, made, node, result
from klein_cns.klein import flux2_sigmas
from klein_cns.sampler import CNSParams
from klein_cns.sampler.acceleration import plan

CNS = replace(CNSParams(), gamma_divider=25.0, energy_scale=0.998)  # the preset that no advice is given on
STEPS = 24
SIGMAS = flux2_sigmas(STEPS, 24).tolist()


def accelerated(name, level, params=OFF, model=None, **how):
    """A run of CNS KSampler whose calls of the model are counted; ``model`` is a patch on the way to it."""
    sampler = {"steps": STEPS, "cfg": 3.0, **how.pop("sampler", {})}
    if level is not None:
        sampler["acceleration"] = level
    prompt = latents(name, params=params, sampler=sampler, **how)
    patches = {"patch": model} if model else {}
    prompt |= patches | {
        "calls": node("ProbeCalls", model=["patch" if model else "loader", 0]),
        "called": node("ProbeCalled", after=["sample", 0]),
    }
    prompt["sample"]["inputs"]["model"] = ["calls", 0]
    return prompt


def guided_by(guider, level, **prompt):
    """A run of CNS Sampler in SamplerCustomAdvanced under ``guider``."""
    sigmas = node("Flux2Scheduler", steps=STEPS, width=96, height=64)
    graph = custom_sampling("guided", CNS, sigmas=sigmas, **prompt) | {"guider": guider}
    graph["cns"]["inputs"]["acceleration"] = level
    return graph


def known(server, patch):
    """Whether this ComfyUI has the node."""
    return patch["class_type"] in server.get(f"/object_info/{patch['class_type']}")


def plain_guider(cfg=3.0, model="loader"):
    return node("CFGGuider", model=[model, 0], positive=["edit", 0], negative=["edit", 1], cfg=cfg)


@pytest.mark.parametrize("params", [OFF, CNS], ids=["off", "churn"])
@pytest.mark.parametrize(("level", "cfg"), [("none", 3.0), ("regular", 3.0), ("high", 3.0), ("high", 1.0)])
def test_calls_and_parity_with_the_diffusers_host(server, host_pipeline, level, cfg, params):
    prompt = accelerated("parity", level, params, sampler={"cfg": cfg})
    outputs = server.run(prompt)["outputs"]
    expected = plan(level, SIGMAS, cfg)
    assert outputs["called"]["calls"] == [expected.calls]
    assert outputs["sample"]["text"] == ([expected.sentence] if level != "none" else [])
    pixels = host_pipeline(
        "make it blue", num_inference_steps=STEPS, seed=5, guidance_scale=cfg, image_size=(96, 64), cns=params,
        acceleration=level,
    ).latents  # fmt: skip
    found = made(server, "parity")
    assert float((found - pixels).abs().max()) <= 1e-4 * float(pixels.abs().max())


def test_a_prompt_saved_without_it_runs_exactly(server):
    none = result(server, accelerated("named", "none", CNS))
    assert torch.equal(result(server, accelerated("saved", None, CNS)), none)
    for level in ("regular", "high"):
        found = result(server, accelerated(level, level, CNS))
        assert not torch.equal(found, none)


@pytest.mark.parametrize("level", ["regular", "high"])
def test_cns_sampler_is_cns_ksampler(server, level):
    ours = result(server, accelerated("ours", level, CNS))
    assert torch.equal(result(server, guided_by(plain_guider(), level)), ours)


@pytest.mark.parametrize("level", ["regular", "high"])
def test_a_picture_of_a_batch_is_the_same_alone(server, level):
    size = {"image_size": "custom", "num_images": 2}
    prompt = accelerated("batch", level, CNS, conditioner=size)
    batch, calls = result(server, prompt), plan(level, SIGMAS, 3.0).calls
    alone = accelerated("alone", level, CNS, conditioner=size)
    alone["second"] = node("LatentFromBatch", samples=["edit", 2], batch_index=1, length=1)
    alone["sample"]["inputs"]["latent_image"] = ["second", 0]
    outputs = server.run(alone)["outputs"]
    assert outputs["called"]["calls"] == [calls]
    torch.testing.assert_close(batch[1:], made(server, "alone"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", ["regular", "high"])
def test_outside_a_mask_the_latent_stays(server, level):
    start = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 64, 96)
    mask[..., :48] = 1
    give(server, "start", start)
    give(server, "half", mask)
    prompt = accelerated("masked", level, CNS)
    prompt |= {
        "start": node("ProbeLoad", name="start"), "half": node("ProbeLoad", name="half"),
        "set": node("SetLatentNoiseMask", samples=["start", 2], mask=["half", 1]),
    }  # fmt: skip
    prompt["sample"]["inputs"]["latent_image"] = ["set", 0]
    found = result(server, prompt)
    torch.testing.assert_close(found[..., 3:], start[..., 3:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[..., :3], start[..., :3], atol=0.1)


@pytest.mark.parametrize(
    "patch",
    [
        node("RescaleCFG", model=["loader", 0], multiplier=0.7),
        node("APG", model=["loader", 0], eta=0.5, norm_threshold=5.0, momentum=-0.5),
        node("CFGNorm", model=["loader", 0], strength=1.0),
        node("SkipLayerGuidanceDiTSimple", model=["loader", 0], double_layers="0", single_layers="1",
             start_percent=0.0, end_percent=1.0),
    ],
    ids=lambda patch: patch["class_type"],
)  # fmt: skip
@pytest.mark.parametrize("level", ["regular", "high"])
def test_patches_of_guidance_go_on_working(server, level, patch):
    """They act at every computed step, and cost no call more."""
    if not known(server, patch):
        pytest.skip(f"this ComfyUI has no {patch['class_type']}")
    outputs = server.run(accelerated("patched", level, model=patch))["outputs"]
    found, plain = made(server, "patched"), result(server, accelerated("plain", level))
    assert outputs["called"]["calls"] == [plan(level, SIGMAS, 3.0).calls]
    assert bool(found.isfinite().all()) and not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("level", ["regular", "high"])
def test_a_patch_that_changes_nothing_changes_nothing(server, level):
    """RescaleCFG with multiplier 0 is plain guidance, computed from both predictions that it gets."""
    patch = node("RescaleCFG", model=["loader", 0], multiplier=0.0)
    found, plain = result(server, accelerated("zero", level, model=patch)), result(server, accelerated("plain", level))
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)


def test_what_it_cannot_be_combined_with_is_a_sentence(server):
    texts = {"positive": ["edit", 0], "negative": ["edit", 1]}
    loader = {"model": ["loader", 0]}
    cache = {**loader, "reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    dual = node("DualCFGGuider", **loader, cond1=["edit", 0], cond2=["edit", 0], negative=["edit", 1],
                cfg_conds=3.0, cfg_cond2_negative=3.0, style="regular")  # fmt: skip
    perp = node("PerpNegGuider", **loader, **texts, empty_conditioning=["edit", 1], cfg=3.0, neg_scale=1.0)
    for guider, name in ((dual, "Guider_DualCFG"), (perp, "Guider_PerpNeg")):
        says = failure(server, guided_by(guider, "regular"))
        assert f"acceleration is 'regular', but the guider is a {name}, which combines predictions" in says
        assert "set acceleration to 'none', or use CFGGuider or BasicGuider" in says
        assert bool(result(server, guided_by(guider, "none")).isfinite().all())
    for patch, says in (
        (node("EasyCache", **cache), "the model has EasyCache, which reuses predictions by itself"),
        (node("LazyCache", **cache), "the model has LazyCache, which reuses predictions by itself"),
        (node("FluxKVCache", **loader), "the model has Flux KV Cache, which reuses predictions by itself"),
        (node("ProbeBoth", **loader), "a patch on the model needs the unconditional prediction computed at every step"),
        (node("CFGOverride", **loader, cfg=1.0, start_percent=0.0, end_percent=0.5), "cfg changes from 3 to 1 during"),
    ):
        if known(server, patch):
            sentence = failure(server, accelerated("refused", "high", model=patch))
            assert "acceleration is 'high', but " in sentence and says in sentence
            assert "set acceleration to 'none'" in sentence


def test_a_mask_that_changes_by_the_step(server):
    mask = torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(2))
    give(server, "soft", mask)
    patch = node("DifferentialDiffusion", model=["loader", 0], strength=1.0)

    def run(level):
        prompt = accelerated("differential", level, CNS, model=patch)
        prompt |= {"soft": node("ProbeLoad", name="soft"),
                   "set": node("SetLatentNoiseMask", samples=["edit", 2], mask=["soft", 1])}  # fmt: skip
        prompt["sample"]["inputs"]["latent_image"] = ["set", 0]
        return prompt

    assert bool(result(server, run("regular")).isfinite().all())
    says = failure(server, run("high"))
    assert "changes the mask from step to step (as Differential Diffusion does); choose 'regular' or 'none'" in says


def test_a_step_without_a_call_stops_at_an_interrupt(server):
    """The step after it is one that calls no model, and there is neither a progress bar nor a preview to notice."""
    sigmas = plan("high", SIGMAS, 3.0)
    first = [action.value for action in sigmas.actions].index("extrapolated")
    prompt = guided_by(plain_guider(model="calls"), "high")
    prompt |= {"calls": node("ProbeCalls", model=["loader", 0]),
               "stop": node("ProbeStop", sampler=["cns", 0], at=first - 1)}  # fmt: skip
    prompt["sample"]["inputs"]["sampler"] = ["stop", 0]
    assert f"interrupted after steps {list(range(first))}, {2 * first} calls" in failure(server, prompt)


def test_the_basic_guider_has_no_guidance_to_reuse(server):
    basic = node("BasicGuider", model=["loader", 0], conditioning=["edit", 0])
    for level in ("regular", "high"):
        texts = server.watch(guided_by(basic, level)).texts
        assert plan(level, SIGMAS, 1.0).sentence in texts


def test_caches_that_do_harm_are_named(server):
    """And stay usable."""
    cache = {"model": ["loader", 0], "reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95,
             "verbose": False}  # fmt: skip
    for patch, params, cfg, says in (
        (node("LazyCache", **cache), CNS, 3.0, ["LazyCache repeats the noise of an earlier step"]),
        (node("LazyCache", **cache), OFF, 3.0, []),
        (node("EasyCache", **cache), OFF, 3.0, ["EasyCache spoils the latent", "computes in float32"]),
        (node("FluxKVCache", model=["loader", 0]), OFF, 3.0, ["Flux KV Cache is for models that were trained with"]),
        (node("FluxKVCache", model=["loader", 0]), OFF, 1.0, []),
    ):
        if not known(server, patch):
            continue
        entry = server.run(accelerated("cached", "none", params, model=patch, sampler={"cfg": cfg, "steps": 4}))
        text = entry["outputs"]["sample"]["text"]
        assert len(text) == bool(says) and all(words in text[0] for words in says)
