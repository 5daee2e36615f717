"""Acceleration: the plan, what it leaves out of the model's calls, and how far the result is from the full run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from klein_cns.klein import flux2_sigmas, log_snr_sigmas
from klein_cns.sampler import CNSParams, sample_cns
from klein_cns.sampler.acceleration import Accelerator, Action, plan
from klein_cns.sampler.noise import NoiseStreams
from klein_cns.sampler.params import LEVELS
from klein_cns.sampler.solvers import SOLVERS
from test_pipeline import SMALL

LETTERS = {"c": Action.COMPUTED, "r": Action.REUSED, "u": Action.UNGUIDED, "x": Action.EXTRAPOLATED}
OFF, CNS = CNSParams(enable_cns=False), CNSParams()
KLEIN = torch.from_numpy(flux2_sigmas(28, 4096))
# of 28 steps at 1 MP, by hand: σ is 1 at the first and .986 at the fourth, below .82 from the twentieth and below .5 at
# the last two; λ of the fourth lies .44 after the third, which lies .73 after the second.
REGULAR = "ccc" + "rc" * 8 + "rrrc" + "rrr" + "uu"
HIGH = "ccc" + "xc" * 8 + "xrxc" + "xrx" + "uu"


def letters(made):
    return "".join(next(letter for letter, action in LETTERS.items() if action is one) for one in made.actions)


class Guided:
    """A guided model of two functions ``(x, sigma [B]) -> x0``; counts the calls of both."""

    def __init__(self, conditional, unconditional, guidance, accelerator):
        self.functions, self.guidance, self.accelerator, self.calls = (
            (conditional, unconditional),
            guidance,
            accelerator,
            0,
        )

    def ask(self, which, x, sigma):
        self.calls += 1
        return self.functions[which](x, sigma)

    def __call__(self, x, sigma, **_):
        conditional = self.ask(0, x, sigma)
        if self.guidance == 1:
            return conditional
        unconditional = self.accelerator.unconditional(conditional, lambda: self.ask(1, x, sigma))
        return unconditional + self.guidance * (conditional - unconditional)


def run(level, functions, x, sigmas=KLEIN, guidance=3.0, solver="euler", params=OFF, **how):
    """(x at the end, calls, plan)"""
    made = plan(level, sigmas, guidance, solver)
    accelerator = Accelerator(made)
    model = Guided(*functions, guidance, accelerator)
    how = {"disable": True, "params": params, "solver": solver, "seed": 7, "accelerator": accelerator, **how}
    return sample_cns(model, x, sigmas, **how), model.calls, made


def noise(count=32, shape=(3, 8, 8), seed=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def mixture(weights, means, spread):
    """The exact denoiser of a mixture of Gaussians of standard deviation ``spread``; means [K, D]."""

    def denoised(x, sigma):
        s = sigma.view(-1, 1)
        flat, a = x.flatten(1), 1 - s
        variance = (a * spread) ** 2 + s**2
        gap = flat[:, None] - a[..., None] * means
        share = torch.softmax(weights.log() - gap.square().sum(2) / (2 * variance), dim=1)
        centre = share @ means
        return (centre + a * spread**2 / variance * (flat - a * centre)).view_as(x)

    return denoised


MEANS = torch.randn(8, 192, generator=torch.Generator().manual_seed(1)) * 0.9


def targets():
    """The conditional denoiser and the unconditional: half of the components, and all of them."""
    even = torch.ones(8) / 8
    return mixture(even[:4], MEANS[:4], 0.5), mixture(even, MEANS, 0.5)


def deviation(x, full):
    return float((x - full).square().mean().sqrt() / full.std())


@pytest.mark.parametrize(("level", "expected", "calls"), [("regular", REGULAR, 40), ("high", HIGH, 28)])
def test_the_plan_of_28_steps_by_hand(level, expected, calls):
    made = plan(level, KLEIN, 3.0)
    assert letters(made) == expected and len(expected) == 28
    by_hand = 2 * expected.count("c") + expected.count("r") + expected.count("u")
    assert made.calls == by_hand == calls


def test_none_computes_everything_and_says_nothing():
    made = plan("none", KLEIN, 5.0)
    assert letters(made) == "c" * 28 and made.calls == 56 and made.sentence == ""
    assert plan("none", torch.tensor([14.6, 3.0, 0.0]), 5.0).calls == 4  # any model's sigmas


def test_the_sentences():
    assert plan("regular", KLEIN, 5.0).sentence == (
        "acceleration regular: 40 of 56 model calls; of 28 steps guidance is reused at 14 and left out at the last 2."
    )
    assert plan("high", KLEIN, 5.0).sentence == (
        "acceleration high: 28 of 56 model calls; of 28 steps guidance is reused at 2 and left out at the last 2, "
        "the prediction is extrapolated at 12."
    )
    assert plan("high", KLEIN, 1.0).sentence == (
        "acceleration high: 16 of 28 model calls; of 28 steps the prediction is extrapolated at 12."
    )


def test_where_a_level_makes_no_sense_it_does_less_and_says_so():
    few = torch.from_numpy(log_snr_sigmas(12, 4096))
    for level in ("regular", "high"):
        made = plan(level, few, 5.0, "sde_2m")
        assert made.calls == 24
        assert made.sentence == (
            f"acceleration {level}: 24 of 24 model calls; the steps lie too far apart to reuse anything."
        )
        assert plan(level, few, 1.0, "sde_2m").calls == 12
        assert plan(level, KLEIN, 5.0, "sde_2m").calls > plan(level, KLEIN, 5.0, "euler").calls
    assert "28 of 28 model calls; without guidance there is none to reuse" in plan("regular", KLEIN, 1.0).sentence


def test_a_run_that_starts_late_keeps_its_guidance():
    """As with denoise below 1: everything that such a run decides is decided at low sigma."""
    for level in ("regular", "high"):
        assert "u" not in letters(plan(level, KLEIN[-8:], 5.0))
        assert "u" not in letters(plan(level, KLEIN[-2:], 5.0))


@st.composite
def schedules(draw):
    sigmas = sorted(draw(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=60)), reverse=True)
    return torch.tensor([*sigmas, *draw(st.sampled_from([[], [0.0]]))], dtype=torch.float32)


@given(sigmas=schedules(), level=st.sampled_from(LEVELS), guidance=st.sampled_from([0.5, 1.0, 5.0]), solver=st.data())
@settings(max_examples=200, deadline=None)
def test_what_holds_for_every_plan(sigmas, level, guidance, solver):
    name = solver.draw(st.sampled_from(list(SOLVERS)))
    made = plan(level, sigmas, guidance, name)
    assert made == plan(level, sigmas.tolist(), guidance, name) and len(made.actions) == len(sigmas) - 1
    text = letters(made)
    assert text[:1] in ("", "c") and "xx" not in text and "rrrr" not in text
    assert not (guidance == 1 and ("r" in text or "u" in text)) and not (level == "regular" and "x" in text)
    for i, action in enumerate(made.actions):
        assert action is not Action.UNGUIDED or sigmas[i] < 0.5
        if action is Action.EXTRAPOLATED:
            assert len({float(s) for s, a in zip(sigmas, text[:i], strict=False) if a != "x" and s < 1}) >= 2
    x = noise(2)
    out, calls, _ = run(level, targets(), x, sigmas, guidance, name)
    assert bool(out.isfinite().all()) and calls == made.calls


def test_unknown_levels_and_other_models_are_named():
    with pytest.raises(ValueError, match="acceleration is 'turbo'; allowed are none, regular, high"):
        plan("turbo", KLEIN, 5.0)
    with pytest.raises(ValueError, match="acceleration needs flow-matching sigmas.*turn acceleration off"):
        plan("high", [14.6, 3.0, 0.0], 5.0)


@pytest.mark.parametrize("params", [OFF, CNS], ids=["off", "churn"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_none_is_the_run_without_it_bit_for_bit(solver, params):
    def plain(x, sigma, **_):
        conditional, unconditional = (ask(x, sigma) for ask in targets())
        return unconditional + 3.0 * (conditional - unconditional)

    found, calls, _ = run("none", targets(), noise(), solver=solver, params=params)
    expected = sample_cns(plain, noise(), KLEIN, disable=True, params=params, solver=solver, seed=7)
    assert calls == 56 and torch.equal(found, expected)


@pytest.mark.parametrize("params", [OFF, CNS], ids=["off", "churn"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("level", ["regular", "high"])
def test_what_is_linear_in_lambda_is_carried_on_exactly(level, solver, params):
    """Both predictions straight in λ, whatever x is: nothing that is left out is missed, also where noise is injected.

    Above σ .5, since below it guidance is left out.
    """
    start, slope = noise(2, (3, 8, 8), seed=5), 0.1 * noise(2, (3, 8, 8), seed=6)

    def straight(which):
        def x0(x, sigma):
            s = sigma.double().clamp(max=0.999)
            lam = (torch.log1p(-s) - torch.log(s)).view(-1, 1, 1, 1)
            return (start[which] + slope[which] * lam).to(x.dtype)

        return x0

    functions, sigmas = (straight(0), straight(1)), KLEIN[:26]
    x = noise(2).double()
    full, calls, _ = run("none", functions, x, sigmas, solver=solver, params=params)
    found, fewer, _ = run(level, functions, x, sigmas, solver=solver, params=params)
    assert fewer < calls
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", ["regular", "high"])
def test_the_same_noise_is_drawn(level, monkeypatch):
    draw, drawn = NoiseStreams.draw, []

    def recorded(self, *args):
        drawn.append(draw(self, *args))
        return drawn[-1]

    monkeypatch.setattr(NoiseStreams, "draw", recorded)
    run("none", targets(), noise(), params=CNS)
    full = list(drawn)
    drawn.clear()
    run(level, targets(), noise(), params=CNS)
    assert len(drawn) == len(full) == 27
    assert all(torch.equal(one, other) for one, other in zip(drawn, full, strict=True))


@pytest.mark.parametrize("params", [OFF, CNS], ids=["off", "churn"])
@pytest.mark.parametrize(("level", "share", "bound"), [("regular", 0.72, 0.02), ("high", 0.5, 0.05)])
def test_a_mixture_keeps_to_the_bounds(level, share, bound, params):
    """Euler, 28 steps, guidance 3: deviation from the same run in full, relative to its standard deviation.

    Where the noise lies between two components, the smallest change decides for the other: one or two in a hundred.
    """
    x = noise(256)
    full, calls, _ = run("none", targets(), x, params=params)
    found, fewer, _ = run(level, targets(), x, params=params)
    assert fewer <= share * calls
    ends = [torch.cdist(result.flatten(1), MEANS).argmin(1) for result in (found, full)]
    same = ends[0] == ends[1]
    assert float(same.float().mean()) >= 0.98
    assert 0 < deviation(found[same], full[same]) <= bound


@pytest.mark.parametrize("level", ["regular", "high"])
def test_an_image_of_a_batch_is_the_image_alone(level):
    x = noise(2)
    together, _, _ = run(level, targets(), x, params=CNS)
    for i in range(2):
        alone, _, _ = run(level, targets(), x[i : i + 1], params=CNS, batch_index=[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_outside_a_mask_the_latent_stays_exactly():
    """As ComfyUI blends: the prediction outside the mask is the latent itself, at extrapolated steps too."""
    latent, mask = noise(1, seed=8), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1

    def masked(ask):
        return lambda x, sigma: ask(x, sigma) * mask + latent * (1 - mask)

    seen = []
    functions = [masked(ask) for ask in targets()]
    out, _, made = run("high", functions, noise(1), callback=seen.append, params=CNS)
    assert Action.EXTRAPOLATED in made.actions and [event["i"] for event in seen] == list(range(28))
    for event in seen:
        torch.testing.assert_close(event["denoised"][..., 4:], latent[..., 4:], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[..., 4:], latent[..., 4:], rtol=0, atol=1e-6)


def accelerated(pipeline, level, **changes):
    how = {**SMALL, "num_inference_steps": 24, "acceleration": level, **changes}
    calls = []
    hook = pipeline.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        return pipeline("make it blue", **how), len(calls)
    finally:
        hook.remove()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("level", LEVELS)
def test_the_pipelines_transformer_is_called_as_planned(pipeline, level, guidance):
    result, calls = accelerated(pipeline, level, guidance_scale=guidance)
    sigmas = torch.from_numpy(flux2_sigmas(24, 24))
    assert calls == plan(level, sigmas, guidance).calls
    assert result.parameters["acceleration"] == level and bool(result.pixels.isfinite().all())


def test_the_pipeline_is_exact_unless_told(pipeline):
    default = pipeline("make it blue", **SMALL)
    assert default.parameters["acceleration"] == "none"
    assert torch.equal(pipeline("make it blue", **SMALL, acceleration="none").latents, default.latents)


@pytest.mark.parametrize("level", ["regular", "high"])
def test_an_image_of_the_pipelines_batch_is_the_image_alone(pipeline, level):
    together, _ = accelerated(pipeline, level, num_images=2, cns=CNS)
    for i in range(2):
        alone, _ = accelerated(pipeline, level, batch_index=[i], cns=CNS)
        torch.testing.assert_close(together.latents[i : i + 1], alone.latents, rtol=1e-3, atol=1e-3)


def test_the_pipelines_callback_sees_every_step(pipeline):
    events = []
    accelerated(pipeline, "high", callback=events.append)
    assert [event["i"] for event in events] == list(range(24))
    assert all(bool(event["denoised"].isfinite().all()) for event in events)
    assert math.isclose(float(events[1]["sigma"]), float(flux2_sigmas(24, 24)[1]), rel_tol=1e-6)
