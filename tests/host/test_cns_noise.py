"""CNS Noise with ComfyUI's own samplers, in one process and on a real server."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from comfy_graph import cns_values, custom_sampling, failure, node, result
from comfy_host import ROOT
from klein_cns.sampler import CNSParams, shipped_progress

SCRIPT = Path(__file__).with_name("noise_on_comfyui.py")
DRAWS = {  # of ComfyUI's samplers, how often in five steps; the two of res_multistep never
    "euler_ancestral": 5, "euler_ancestral_cfg_pp": 5, "exp_heun_2_x0_sde": 10, "dpm_2_ancestral": 5,
    "dpmpp_2s_ancestral": 5, "dpmpp_2s_ancestral_cfg_pp": 5, "dpmpp_sde": 10, "dpmpp_sde_gpu": 10, "dpmpp_2m_sde": 5,
    "dpmpp_2m_sde_gpu": 5, "dpmpp_2m_sde_heun": 5, "dpmpp_2m_sde_heun_gpu": 5, "dpmpp_3m_sde": 5, "dpmpp_3m_sde_gpu": 5,
    "ddpm": 5, "lcm": 5, "res_multistep": 0, "res_multistep_cfg_pp": 0, "res_multistep_ancestral": 5,
    "res_multistep_ancestral_cfg_pp": 5, "er_sde": 5, "seeds_2": 10, "seeds_3": 15, "sa_solver": 3, "sa_solver_pece": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(comfyui):
    """What the script prints, of a fresh seed."""
    seed = int(os.environ.get("KLEIN_CNS_SEED", 0)) or int.from_bytes(os.urandom(3), "big")
    print(f"KLEIN_CNS_SEED={seed}")
    folder, python = comfyui
    done = subprocess.run(
        [python, SCRIPT, ROOT, str(seed)], cwd=folder, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["flux2", "sd15"])
def test_every_sampler_takes_the_noise_or_is_refused_in_words(found, kind):
    for name, one in found["samplers"][kind].items():
        if name == "dpm_adaptive":  # its steps are its own
            assert one["draws"] > 0 and not one["said"]
        elif name in DRAWS:
            assert one["draws"] == DRAWS[name], name
            assert one["equal"] == bool(one["said"]) == (DRAWS[name] == 0), name
            assert all(f"the sampler {name} added no noise" in line for line in one["said"])
        else:
            called = {"ddim": "euler", "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2"}.get(name, name)
            assert f"the sampler {called} draws no noise" in one["error"], name
            assert "er_sde, " in one["error"], name


@pytest.mark.parametrize("kind", ["flux2", "sd15"])
def test_white_noise_of_ours_has_the_statistics_of_the_samplers_own(found, kind):
    """The variance of the end of a run that is linear in its noise, which shows also what draws of one step share."""
    for name, one in found["samplers"][kind].items():
        if "error" not in one:
            bound = 5 * math.sqrt(2 * 2 / one["values"])
            assert one["ours"] / one["own"] == pytest.approx(1, abs=bound), name


@pytest.mark.parametrize("kind", ["flux2", "sd15", "wan", "dpmpp_sde"])
def test_the_noise_has_the_power_of_the_table_in_every_ring(found, kind):
    """The endpoint's formula, of its defaults, written out once more; on the unpacked grid of FLUX.2."""
    rings, default = found["rings"][kind], CNSParams()
    modes = torch.tensor(rings["modes"], dtype=torch.float64)
    steps = len(rings["schedule"]) - 1
    place = torch.arange(16, dtype=torch.float64) / 15
    assert rings["size"] == {"flux2": [16, 24], "wan": [16, 24]}.get(kind, [64, 48])
    assert len(rings["power"]) == steps
    for i, (start, measured) in enumerate(rings["power"].items()):
        sigma = float(start)
        t = 1 - sigma if kind in ("flux2", "wan") else 1 / (1 + sigma)
        p = math.expm1(0.75 * i / (steps - 1)) / math.expm1(0.75)
        alpha = default.alpha_tilt_start + p * (default.alpha_tilt_end - default.alpha_tilt_start)
        residual = 1 - shipped_progress().at(t, 16).double() / default.gamma_divider
        power = residual**default.power_gamma * torch.exp(alpha * place)
        power *= 0.98**2 * modes.sum() / (power * modes).sum()
        for ring, value in enumerate(measured):
            if value is not None:
                bound = 5 * math.sqrt(2 / (rings["modes"][ring] * rings["planes"]))
                assert value / float(power[ring]) == pytest.approx(1, abs=bound), (start, ring)


def test_draws_of_one_step_share_what_a_brownian_tree_shares(found):
    for r, one in found["shared"].items():
        assert len(one["pairs"]) >= 10, r
        for product, expected in one["pairs"]:
            assert product == pytest.approx(expected, abs=5 * math.sqrt(2 / one["values"])), r


@pytest.mark.parametrize("what", ["batch", "again", "own_seed", "off", "untouched", "kept", "reference"])
def test_it_holds(found, what):
    """An image in a batch and alone; two runs; a seed of its own; switched off; the model before it; a mask;
    references."""
    assert found[what] is True


def test_another_seed_makes_another_picture(found):
    assert found["other_seed"] is False


def test_a_sampler_that_is_told_to_add_no_noise_gives_its_own_result_and_the_node_says_so(found):
    same, said = found["silent"]
    assert same and len(said) == 1 and said[0].startswith("the sampler euler_ancestral added no noise in this run")


def test_what_cannot_be_right_is_refused_in_words(found):
    said = found["refused"]
    assert "the sampler given has noise of its own from another node (noise_sampler)" in said["given"]
    assert "the sampler is a Loop with a loop of its own" in said["loop"]
    assert "without height and width" in said["packed"] and "enable_cns off" in said["packed"]
    assert "comes from another CNS Noise" in said["twice"]
    assert "needs at least one reference picture" in said["reference"]


def with_noise(name, sampler, params=None, cfg=5.0):
    """Klein's own graph with CNS Noise before its guider, and a sampler of ComfyUI."""
    prompt = custom_sampling(name, CNSParams())
    values = {key: value for key, value in cns_values(params or CNSParams()).items() if key != "cns_s_churn"}
    prompt["noise_color"] = node("CNSNoise", model=["loader", 0], cns_seed=-1, **values)
    prompt["guider"]["inputs"] |= {"model": ["noise_color", 0], "cfg": cfg}
    prompt["cns"] = sampler
    return prompt


ER_SDE = node("KSamplerSelect", sampler_name="er_sde")


def test_on_the_server_off_is_bit_for_bit_without_the_node(server):
    off = with_noise("off", ER_SDE, CNSParams(enable_cns=False))
    plain = with_noise("plain", ER_SDE)
    plain["guider"]["inputs"]["model"] = ["loader", 0]
    expected = result(server, plain)
    assert torch.equal(result(server, off), expected)
    on = result(server, with_noise("on", ER_SDE))
    assert on.isfinite().all() and not torch.equal(on, expected)
    assert torch.equal(result(server, plain), expected), "the loader's model is as it was"


def test_on_the_server_the_sentences_reach_the_user(server):
    text = failure(server, with_noise("refused", node("KSamplerSelect", sampler_name="dpmpp_2m")))
    assert text.startswith("ValueError: the sampler dpmpp_2m draws no noise")
    heard = server.watch(with_noise("advised", ER_SDE))
    assert any("meant for sampling without guidance, and cfg is 5" in text for text in heard.texts)
    silent = node("SamplerEulerAncestral", eta=0.0, s_noise=1.0)
    heard = server.watch(with_noise("silent", silent, cfg=1.0))
    assert [text.partition(",")[0] for text in heard.texts if "sampler" in text] == [
        "the sampler euler_ancestral added no noise in this run"
    ]
