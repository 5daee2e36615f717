"""The nodes among ComfyUI's own: samplers, schedules, caches, LoRAs, batches, interrupts, previews."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
from comfy_graph import custom_sampling, failure, give, graph, latents, made, node, result
from comfy_host import Failed
from klein_cns.klein.references import to_pixels
from klein_cns.sampler import CNSParams, sample_cns, shipped_progress
from klein_cns.sampler.progress import approximation
from safetensors.torch import save_file

CNS = CNSParams()
FULL = CNSParams(s_churn=1.0)
STILL = CNSParams(s_churn=0)  # plain Euler
FLUX2 = node("Flux2Scheduler", steps=4, width=96, height=64)


@pytest.mark.parametrize(
    ("solver", "params"),
    [("euler", STILL), ("euler", CNS), ("sde_2m", FULL), ("sde_2m", STILL), ("sde_3m", FULL), ("sde_3m", STILL)],
)
def test_cns_sampler_is_cns_ksampler(server, solver, params):
    ours = result(server, latents("ksampler", params=params, sampler={"solver": solver}))
    assert torch.equal(result(server, custom_sampling("custom", params, solver=solver)), ours)


def test_a_schedule_of_comfyui(server):
    sigmas = node("BasicScheduler", model=["loader", 0], scheduler="simple", steps=4, denoise=1.0)
    ours = result(server, latents("ours", params=CNS, sampler={"scheduler": "simple"}))
    assert torch.equal(result(server, custom_sampling("theirs", CNS, sigmas=sigmas)), ours)


@pytest.mark.parametrize("solver", ["sde_2m", "sde_3m"])
@pytest.mark.parametrize("params", [FULL, STILL], ids=["churn", "still"])
def test_log_snr_is_the_same_on_the_diffusers_host(server, host_pipeline, solver, params):
    ours = result(server, latents("log_snr", params=params, sampler={"scheduler": "log_snr", "solver": solver}))
    expected = host_pipeline(
        "make it blue",
        num_inference_steps=4,
        seed=5,
        solver=solver,
        scheduler="log_snr",
        image_size=(96, 64),
        cns=params,
    ).latents
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_denoise_runs_the_last_steps_of_a_longer_schedule(server):
    start = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(1))
    give(server, "start", start)
    prompt = latents("part", sampler={"denoise": 0.5}) | {"start": node("ProbeLoad", name="start")}
    prompt["sample"]["inputs"]["latent_image"] = ["start", 2]
    ours = result(server, prompt)
    last = node("SplitSigmas", sigmas=["flux2", 0], step=4)
    theirs = custom_sampling("last", STILL, sigmas=last, latent=["start", 2])
    theirs["sample"]["inputs"]["sigmas"] = ["sigmas", 1]
    theirs |= {"flux2": node("Flux2Scheduler", steps=8, width=96, height=64), "start": prompt["start"]}
    assert torch.equal(result(server, theirs), ours)
    assert not torch.allclose(ours, start, atol=0.1)


def halves(name, params, cns_seed):
    """The first two steps, then the rest without new initial noise."""
    first = custom_sampling(name, params)
    first |= {"flux2": FLUX2, "sigmas": node("SplitSigmas", sigmas=["flux2", 0], step=2)}
    second = custom_sampling(name, params, cns_seed=cns_seed, noise=node("DisableNoise"), latent=["sample", 0])
    return first | {
        "cns2": second["cns"],
        "none": second["noise"],
        "second": node(
            "SamplerCustomAdvanced", noise=["none", 0], guider=["guider", 0], sampler=["cns2", 0],
            sigmas=["sigmas", 1], latent_image=["sample", 0],
        ),
        "save": node("ProbeSave", name=name, latent=["second", 0]),
    }  # fmt: skip


def test_a_schedule_in_two_halves(server):
    """A first half that does not end at 0, a second with DisableNoise: without CNS the whole run, with it reproducible
    and other noise for another cns_seed."""
    whole = result(server, latents("whole"))
    torch.testing.assert_close(result(server, halves("off", STILL, -1)), whole, rtol=1e-4, atol=1e-4)
    runs = [result(server, halves(name, CNS, seed)) for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], atol=1e-2)
    assert all(bool(run.isfinite().all()) for run in runs)


def test_a_picture_of_a_batch_is_the_same_alone(server):
    """Four pictures at once, and the third alone with its batch_index."""
    size = {"image_size": "custom", "num_images": 4}
    batch = result(server, latents("batch", params=FULL, sampler={"solver": "sde_2m"}, conditioner=size))
    alone = latents("alone", params=FULL, sampler={"solver": "sde_2m"}, conditioner=size)
    alone["third"] = node("LatentFromBatch", samples=["edit", 2], batch_index=2, length=1)
    alone["sample"]["inputs"]["latent_image"] = ["third", 0]
    assert batch.shape == (4, 128, 4, 6)
    torch.testing.assert_close(batch[2:3], result(server, alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch[0], batch[2], atol=0.1)


@pytest.mark.parametrize("kind", ["flux1", "flux2"])
def test_noise_is_coloured_in_the_models_own_latent(server, kind):
    """A model that predicts 0 leaves nothing but noise: the same as the core makes it for that patch size."""
    shape = {"flux1": (2, 16, 24, 40), "flux2": (2, 128, 8, 12)}[kind]
    give(server, f"zeros_{kind}", torch.zeros(shape))
    prompt = custom_sampling(
        "noise", CNS, cns_seed=11, noise=node("DisableNoise"), latent=["zeros", 2],
        sigmas=node("SplitSigmas", sigmas=["flux2", 0], step=2),
    )  # fmt: skip
    model = ["flux1", 0] if kind == "flux1" else ["loader", 0]
    cond = ["flux1", 1] if kind == "flux1" else ["edit", 0]
    prompt |= {
        "flux2": FLUX2, "flux1": node("ProbeFlux1"), "zeros": node("ProbeLoad", name=f"zeros_{kind}"),
        "nothing": node("ProbeNothing", model=model),
        "guider": node("BasicGuider", model=["nothing", 0], conditioning=cond),
        "probe": node("ProbeSigmas", sigmas=["sigmas", 0]),
    }  # fmt: skip
    found = result(server, prompt)
    sigmas = made(server, "sigmas")
    expected = sample_cns(
        lambda x, sigma: torch.zeros_like(x), torch.zeros(shape), sigmas, disable=True,
        params=CNS, progress=shipped_progress("sit_xl2_unguided"), patch_size=1 if kind == "flux1" else 2, seed=11,
    )  # fmt: skip
    scale, shift = (0.3611, 0.1159) if kind == "flux1" else (1, 0)  # of FLUX.1's latents
    torch.testing.assert_close(found, expected / (1 - sigmas[-1]) / scale + shift, rtol=1e-4, atol=1e-4)
    assert float(found.std()) > 0.1


def test_flux1_runs_and_without_churn_is_comfyuis_euler(server):
    give(server, "empty", torch.zeros(1, 16, 24, 40))

    def run(name, params):
        prompt = custom_sampling(name, params, latent=["zeros", 2])
        return prompt | {
            "flux1": node("ProbeFlux1"), "zeros": node("ProbeLoad", name="empty"),
            "guider": node("BasicGuider", model=["flux1", 0], conditioning=["flux1", 1]),
        }  # fmt: skip

    still, coloured = (result(server, run(name, p)) for name, p in (("s", STILL), ("c", CNS)))
    euler = run("e", STILL) | {"cns": node("KSamplerSelect", sampler_name="euler")}
    assert torch.equal(still, result(server, euler))
    assert bool(coloured.isfinite().all()) and not torch.allclose(coloured, still, atol=0.05)


def test_easy_cache_skips_steps_of_ours(server):
    how = {"params": CNS, "sampler": {"steps": 12}}
    prompt = latents("cached", **how)
    prompt["cache"] = node(
        "EasyCache", model=["loader", 0], reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=True
    )
    prompt["sample"]["inputs"]["model"] = ["cache", 0]
    before = server.log.read_text().count("EasyCache [verbose] - skipping step")
    cached = result(server, prompt)
    assert server.log.read_text().count("EasyCache [verbose] - skipping step") > before
    assert bool(cached.isfinite().all()) and not torch.equal(cached, result(server, latents("uncached", **how)))


def test_a_lora_of_comfyuis_loader_is_the_diffusers_hosts(server, host_pipeline):
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_qkv_mlp_proj", "proj_out"):
        rows, columns = host_pipeline.pipe.transformer.get_submodule(name).weight.shape
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    path = server.base / "models" / "loras" / "some.safetensors"
    save_file(state, path)
    prompt = latents("lora", params=CNS)
    prompt["lora"] = node("LoraLoaderModelOnly", model=["loader", 0], lora_name=path.name, strength_model=0.7)
    prompt["sample"]["inputs"]["model"] = ["lora", 0]
    found = result(server, prompt)
    how = {"num_inference_steps": 4, "seed": 5, "image_size": (96, 64), "cns": CNS}
    host_pipeline.set_loras([(path, 0.7)])
    expected = host_pipeline("make it blue", **how).latents
    host_pipeline.set_loras([])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, host_pipeline("make it blue", **how).latents, atol=0.1)


def test_progress_and_previews(server):
    run = server.watch(latents("watched", params=CNS, sampler={"seed": 21}))
    assert [(value, of) for where, value, of in run.progress if where == "sample"] == [(i, 4) for i in (1, 2, 3, 4)]
    assert run.previews


def test_an_interrupt_stops_within_a_step(server):
    """A step takes a minute here; the run ends long before, as interrupted, and the next one works."""
    prompt = latents("interrupted", params=CNS)
    prompt["slow"] = node("ProbeSlow", model=["loader", 0])
    prompt["sample"]["inputs"]["model"] = ["slow", 0]
    with pytest.raises(Failed, match="interrupted"):
        server.watch(prompt, interrupt_at="sample")
    assert bool(result(server, latents("after", params=CNS, sampler={"seed": 22})).isfinite().all())


def test_a_picture_over_2048_is_said_to_be_scaled(server, photo):
    give(server, "long", to_pixels(photo.resize((2100, 80))).movedim(1, -1))
    outputs = server.run(graph("long", images=["long"], sampler={"steps": 1, "cfg": 1.0}))["outputs"]
    assert "2100x80 is scaled to 2048x" in outputs["edit"]["text"][0]


def test_a_gamma_file_of_the_user(server):
    """A file in models/cns_gamma is listed and used; the same values as a shipped fit give the same picture."""
    fit = shipped_progress("sit_xl2_unguided")
    fit.save(server.base / "models" / "cns_gamma" / "mine.safetensors")
    shipped = result(server, latents("shipped", params=CNS))
    own = result(server, latents("own", params=CNS, sampler={"cns_gamma_file": "mine.safetensors"}))
    torch.testing.assert_close(own, shipped, rtol=1e-5, atol=1e-5)
    info = server.get("/object_info/CNSKSampler")["CNSKSampler"]["input"]["required"]["cns_gamma_file"]
    assert "mine.safetensors" in str(info)
    approximation().save(server.base / "models" / "cns_gamma" / "mine.safetensors")
    replaced = result(server, latents("own", params=CNS, sampler={"cns_gamma_file": "mine.safetensors"}))
    assert not torch.allclose(replaced, shipped, atol=1e-3)


@pytest.mark.parametrize("linked", [False, True])
def test_a_gamma_file_runs_the_node_again_only_when_it_changes(server, linked):
    file = server.base / "models" / "cns_gamma" / "kept.safetensors"
    shipped_progress("sit_xl2_unguided").save(file)
    prompt = latents(f"kept{linked}", params=CNS, sampler={"cns_gamma_file": "kept.safetensors"})
    if linked:
        prompt["text"] = node("ProbeText", text="kept.safetensors")
        prompt["sample"]["inputs"]["cns_gamma_file"] = ["text", 0]

    def cached():
        messages = dict(server.run(prompt)["status"]["messages"])
        return "sample" in messages["execution_cached"]["nodes"]

    cached()
    assert cached()
    approximation().save(file)
    os.utime(file, ns=(1, 1))
    assert not cached()
    assert cached()


def test_only_files_that_can_hold_a_matrix_are_listed(server):
    folder = server.base / "models" / "cns_gamma"
    for name in ("notes.txt", "card.png", "mine.json", "upper.SAFETENSORS", "old.pt"):
        (folder / name).write_bytes(b"")
    time.sleep(1)  # ComfyUI looks at the folder's time
    info = server.get("/object_info/CNSKSampler")["CNSKSampler"]["input"]["required"]["cns_gamma_file"]
    assert {"upper.SAFETENSORS", "old.pt"} <= set(_options(info))
    assert not {"notes.txt", "card.png", "mine.json"} & set(_options(info))


@pytest.mark.parametrize("name", ["C:/kept.safetensors", "../cns_gamma/kept.safetensors", "/kept.safetensors", ""])
def test_a_gamma_file_outside_its_folder_does_not_exist(server, name):
    says = failure(server, latents("outside", params=CNS, sampler={"cns_gamma_file": name}))
    assert f"cns_gamma_file {name!r} does not exist; put it into models/cns_gamma/" in says


def test_settings_that_can_hardly_be_meant_are_named_on_the_node(server):
    """On CNS KSampler and, through SamplerCustomAdvanced, on CNS Sampler; plain settings say nothing."""
    guided = replace(CNS, gamma_divider=25.0, energy_scale=0.998)
    wild = replace(guided, s_churn=2.0, energy_scale=1.5)
    surplus = "cns_s_churn 2 with cns_energy_scale 1.5 adds more noise than the model removes, at 3 of 3 steps"
    unguided = "cns_gamma_divider 1.73 and cns_energy_scale 0.98 are meant for sampling without guidance, and cfg is 5"
    for params, says in ((guided, []), (wild, [surplus]), (CNS, [unguided]), (replace(CNS, enable_cns=False), [])):
        found = server.run(latents("told", params=params, sampler={"seed": 41}))["outputs"]["sample"]["text"]
        assert len(found) == len(says) and all(words in text for text, words in zip(found, says, strict=True)), found
    texts = server.watch(custom_sampling("told", params=wild)).texts
    assert any("adds more noise than the model removes" in text for text in texts)
    texts = server.run(latents("told", params=CNS, sampler={"cfg": 1.0}))["outputs"]["sample"]["text"]
    assert not any("meant" in text for text in texts)


def test_wrong_numbers_are_refused_with_their_range(server):
    for sampler, says in (
        ({"cns_gamma_divider": float("nan")}, "cns_gamma_divider"),
        ({"cns_s_churn": 5.0}, "cns_s_churn"),
        ({"scheduler": "none"}, "scheduler"),
        ({"cfg": float("nan")}, "cfg is nan; allowed is a number from 0.0 to 100.0"),
        ({"denoise": float("nan")}, "denoise is nan; allowed"),
        ({"denoise": 1e-300}, "denoise is 1e-300 with steps 4, which leaves nothing to do"),
        ({"denoise": 0.01, "steps": 150}, "denoise is 0.01 with steps 150, which leaves nothing to do"),
    ):
        assert says in failure(server, latents("wrong", params=CNS, sampler=sampler))


def _options(info):
    """The options of a combo in /object_info, in either of ComfyUI's forms."""
    return info[1]["options"] if info[0] == "COMBO" else info[0]
