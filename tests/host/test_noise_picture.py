"""The numbers of the picture on the node, by HTTP and in what a run sends, against the core."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
import torch
from comfy_graph import ask, custom_sampling, give, graph, latents, made, node, refusal
from klein_cns.klein.presets import PRESETS
from klein_cns.klein.schedules import flux2_sigmas
from klein_cns.sampler import CNSParams, unpatchify
from klein_cns.sampler.noise_view import NoiseView, noise_view

ON = CNSParams(s_churn=0.8)
PIXELS = 8  # of a cell of the unpatchified latent


def cns(params):
    return {name: value for name, value in params.to_request().items() if name != "enable_cns"}


def view_of(params, width, height, steps, solver="euler", progress=None):
    sigmas = flux2_sigmas(steps, width * height // 256)
    return noise_view(params, sigmas, (height // 8, width // 8), solver=solver, progress=progress, cell=PIXELS)


def check(found, view):
    """JSON has six digits, and null for what is infinite; ComfyUI's sigmas are float32, and γ is steep between them."""
    assert set(NoiseView._fields) <= set(found)
    for name in ("sigmas", "power", "gamma", "std", "modes"):
        wanted = torch.as_tensor(getattr(view, name), dtype=torch.float64)
        torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), wanted, rtol=1e-4, atol=1e-6)
    assert found["steps"] == view.steps
    assert found["wavelengths"][0] is None
    assert found["wavelengths"][1:] == pytest.approx(view.wavelengths[1:].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("params", "solver", "steps", "size"),
    [
        (CNSParams(), "euler", 28, (1024, 1024)),
        (CNSParams(s_churn=2.0, num_freq_bins=128, formula="authors"), "sde", 5, (512, 1440)),
        (CNSParams(num_freq_bins=8, gamma_source="approximation"), "sde_2m", 12, (96, 64)),
    ],
)
def test_a_preview_is_the_cores_table(server, params, solver, steps, size):
    width, height = size
    found = ask(server, "noise", **cns(params), solver=solver, steps=steps, width=width, height=height)
    check(found, view_of(params, width, height, steps, solver, None))
    assert found["size"] == [width, height]


def test_what_is_left_out_is_the_endpoints(server):
    check(ask(server, "noise"), view_of(CNSParams(), 1024, 1024, 28))


def test_auto_is_the_first_pictures_size(server):
    found = ask(server, "noise", image_size="auto", first=[640, 400], steps=2)
    assert found["size"] == [640, 400]
    assert ask(server, "noise", image_size="auto", steps=2)["size"] == [1024, 768]
    assert ask(server, "noise", image_size="square", steps=2)["size"] == [512, 512]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 0}, "steps is 0; allowed is a whole number from 1 to "),
        ({"steps": 10**9}, "steps is 1000000000; allowed "),
        ({"steps": 2.5}, "steps is 2.5 (float); allowed "),
        ({"steps": "28"}, "steps is '28' (str); allowed "),
        ({"cns_num_freq_bins": 100_000}, "cns_num_freq_bins is 100000; allowed "),
        ({"cns_s_churn": None}, "cns_s_churn is None (NoneType); allowed "),
        ({"cns_gamma_source": "x"}, "cns_gamma_source is 'x'; allowed "),
        ({"cns_gamma_source": "reference"}, "known after a run"),
        ({"cns_gamma_source": "reference", "reference": [1.0]}, "reference must be a list of 2 to 128 numbers"),
        ({"cns_gamma_source": "reference", "reference": ["x"] * 4}, "a power of reference is 'x' (str); allowed "),
        ({"cns_gamma_file": "../../secret"}, "../../secret"),
        ({"width": 10**7}, "width is 10000000; allowed "),
        ({"height": -16}, "height is -16; allowed "),
        ({"first": [1, 2, 3]}, "give the first picture's [width, height]"),
        ({"first": [10**9, 1], "image_size": "auto"}, "a side of first is 1000000000; allowed "),
        ({"image_size": "vast"}, "vast"),
        ({"solver": "heun"}, "solver is 'heun'; allowed are euler, "),
        ({"scheduler": []}, "scheduler is []; allowed are flux2, "),
        ({"denoise": 0}, "nothing to draw"),
        ({"denoise": 1e-7}, "nothing to draw"),
        ({"surprise": 1}, "unknown values: surprise"),
    ],
)
def test_a_value_out_of_range_is_named(server, values, says):
    assert says in refusal(server, "noise", **values)


@pytest.mark.parametrize("text", ["[]", "{", "7", "[" * 5000, "x" * 8001, "%7B%22steps%22%3ANaN%7D"])
def test_a_query_that_is_no_object_is_refused(server, text):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.get(f"/klein_cns/noise?values={text}")
    assert error.value.code == 400 and json.loads(error.value.read())["error"]


def test_routes_only_answer_to_get(server):
    for method in ("POST", "PUT", "DELETE"):
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/klein_cns/noise", b"{}", method=method)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=30)
        assert error.value.code == 405


def test_presets_are_the_cores_by_the_names_of_the_widgets(server):
    found = ask(server, "presets")
    assert list(found) == list(PRESETS)
    [info] = server.get("/object_info/CNSKSampler").values()
    widgets = info["input"]["required"] | info["input"].get("optional", {})
    for name, preset in PRESETS.items():
        values = dict(preset.values)
        for public, widget in (("num_inference_steps", "steps"), ("guidance_scale", "cfg")):
            if public in values:
                values[widget] = values.pop(public)
        assert found[name] == {"values": values, "source": preset.source}
        assert set(values) <= set(widgets)


def sent(entry, node_id="sample"):
    return entry["outputs"].get(node_id, {}).get("klein_noise")


def test_a_run_sends_its_own_numbers_and_the_spectrum_of_its_result(server):
    """γ `reference` and the measured spectra are of the latents that the model saw."""
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(3))
    give(server, "noise_first", picture)
    params = CNSParams(s_churn=0.8, gamma_source="reference")
    prompt = graph("noise_run", params=params, images=["noise_first"])
    prompt["kept"] = node("ProbeSave", name="noise_latent", latent=["sample", 0])
    [found] = sent(server.run(prompt))
    assert found["size"] == [96, 64] and len(found["sigmas"]) == 5
    sampled = unpatchify(made(server, "noise_latent").double(), 2)
    height, width = sampled.shape[-2:]
    assert (height, width) == (8, 12)
    power = torch.fft.fft2(sampled, norm="ortho").abs().square().mean(dim=(0, 1))
    fy, fx = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    radius = torch.hypot(*torch.meshgrid(fy, fx, indexing="ij"))
    band = (radius / radius.max() * 31).long()
    for b in band.unique().tolist():
        assert found["spectrum"][b] == pytest.approx(float(power[band == b].mean()), rel=1e-3)
    # what it sent draws the same preview
    again = ask(server, "noise", **cns(params), steps=4, width=96, height=64, reference=found["reference"])
    assert torch.allclose(torch.tensor(again["power"]), torch.tensor(found["power"]), rtol=1e-4)
    assert found["first"] == found["reference"]


@pytest.mark.parametrize("kind", ["off", "churn 0"])
def test_a_run_without_noise_sends_none(server, kind):
    params = CNSParams(enable_cns=False) if kind == "off" else CNSParams(s_churn=0.0)
    assert not sent(server.run(latents(f"noise_{kind[:3]}", params=params)))


def test_cns_sampler_sends_the_numbers_of_the_run_that_used_it(server):
    heard = server.watch(custom_sampling("noise_custom", ON))
    [found] = [output["klein_noise"][0] for output in heard.outputs if "klein_noise" in output]
    check(found, view_of(ON, 96, 64, 4))
