"""sample_cns: the loop, its noise, and what it leaves alone."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from klein_cns.klein import flux2_sigmas
from klein_cns.sampler import CNSParams, CNSRun, ProgressMatrix, reference_progress, sample_cns, shipped_progress
from klein_cns.sampler.noise import NoiseStreams
from klein_cns.sampler.solvers import SOLVERS, Solver, Step
from test_spectrum import PARAMS
from torch.utils._python_dispatch import TorchDispatchMode

SIGMAS = torch.from_numpy(flux2_sigmas(8, 64))
SHAPE = (2, 128, 8, 8)


def model(x, sigma, **_):
    """A smooth, non-linear stand-in for a denoiser."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * (1 - s)) * 0.7


def noise(shape=SHAPE, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(x=None, sigmas=SIGMAS, **kwargs):
    kwargs = {"params": CNSParams(), "patch_size": 2, "seed": 11, "disable": True, **kwargs}
    return sample_cns(model, noise() if x is None else x, sigmas, **kwargs)


def plain_euler(x, sigmas):
    """k-diffusion's ``sample_euler``, written down again."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = model(x, sigma.expand(len(x)))
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    return x


QUIET = [CNSParams(s_churn=0.0), CNSParams(enable_cns=False, s_churn=2.0, gamma_source="reference")]


@pytest.mark.parametrize("params", QUIET, ids=["no churn", "off"])
@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_without_churn_or_with_cns_off_it_is_plain_euler_bit_for_bit(params, solver):
    assert torch.equal(run(params=params, solver=solver), plain_euler(noise(), SIGMAS))


@pytest.mark.parametrize("params", QUIET, ids=["no churn", "off"])
def test_sde_2m_without_churn_or_with_cns_off_is_dpm_solver_2m(params):
    """The second-order ODE of DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), written down in its own variables."""
    x, before, lam_before = noise(), None, None
    for i, (s, t) in enumerate(zip(SIGMAS[:-1].double(), SIGMAS[1:].double(), strict=True)):
        x0 = model(x, s.float().expand(len(x))).double()
        if t == 0:
            x = x0
            break
        lam_s, lam_t = torch.log((1 - s) / s), torch.log((1 - t) / t)
        d = x0
        if i >= 2:  # λ of the first sigma, 1, is infinite
            r = (lam_s - lam_before) / (lam_t - lam_s)
            d = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x = (t / s * x.double() - (1 - t) * torch.expm1(-(lam_t - lam_s)) * d).float()
        before, lam_before = x0, lam_s
    torch.testing.assert_close(run(params=params, solver="sde_2m"), x.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("params", QUIET, ids=["no churn", "off"])
def test_sde_3m_without_churn_or_with_cns_off_integrates_the_parabola(params):
    """The Lagrange polynomial through the last three x0, in τ = log((1-σ)/σ + .003), integrated by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    x, history = noise().double(), []
    for s, t in pairwise(SIGMAS.double().tolist()):
        x0 = model(x.float(), torch.full((len(x),), s)).double()
        if t == 0:
            x = x0
            break
        start, end = (math.log((1 - sigma) / sigma + 0.003) for sigma in (s, t))
        history = [(start, x0), *history][:3]
        tau = (start + end) / 2 + (end - start) / 2 * nodes
        slope = (end - start) / 2 * weights * np.exp(tau)  # du = e^τ dτ
        x = t / s * x
        for at, value in history:
            others = [(tau - other) / (at - other) for other, _ in history if other != at]
            x = x + t * float((slope * np.prod(others, axis=0)).sum()) * value
    torch.testing.assert_close(run(params=params, solver="sde_3m"), x.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("sde", 1), ("sde_2m", 2), ("sde_3m", 3)])
def test_the_order_of_a_solver(solver, order):
    """One step on the exact path of a Gaussian of variance P, x ∝ sqrt((1-σ)²P + σ²): halving it tells the order."""
    power, start = 4.0, 0.5

    def exact(sigma):
        return torch.full((1, 1, 1, 1), math.sqrt((1 - sigma) ** 2 * power + sigma**2), dtype=torch.float64)

    def x0(sigma):
        return (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2) * exact(sigma)

    def error(h):
        before, last, now, after = (1 / (1 + math.exp(k * h)) for k in (-2, -1, 0, 1))
        assert now == start
        empty = torch.empty(0)
        step = Step(now, after, 0.0, 1.0, 1, empty, empty, [(x0(last), last), (x0(before), before)])
        return abs(float(SOLVERS[solver].step(exact(now), x0(now), step) - exact(after)))

    assert math.log2(error(0.02) / error(0.01)) == pytest.approx(order + 1, abs=0.1)


@pytest.mark.parametrize("solver", ["sde_2m", "sde_3m"])
def test_a_repeated_sigma_changes_nothing(solver):
    sigmas = torch.tensor([1.0, 1.0, 0.8, 0.8, 0.8, 0.5, 0.2, 0.2, 0.1, 0.0])
    found = run(sigmas=sigmas, solver=solver, params=QUIET[0])
    torch.testing.assert_close(found, run(sigmas=sigmas.unique().flip(0), solver=solver, params=QUIET[0]))


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="solver is 'heun'; allowed are euler, sde, sde_2m, sde_3m"):
        run(solver="heun")


def test_a_new_solver_by_the_recipe(monkeypatch):
    """A function and its line in SOLVERS: an option of the request and the command, and the loop runs it."""

    def still(x, denoised, step):
        return x

    monkeypatch.setitem(SOLVERS, "still", Solver(still, "stays where it is"))
    sigmas = SIGMAS[:-1]
    assert torch.equal(run(sigmas=sigmas, solver="still"), noise())
    with pytest.raises(ValueError, match="allowed are euler, sde, sde_2m, sde_3m, still"):
        run(solver="heun")


@given(params=PARAMS, solver=st.sampled_from(list(SOLVERS)))
@settings(max_examples=60, deadline=None)
def test_no_allowed_combination_gives_nan(params, solver):
    x = noise((1, 16, 3, 5))
    progress = reference_progress(x, 2) if params.gamma_source == "reference" else None
    out = run(x, params=params, solver=solver, progress=progress)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("solver", ["sde", "sde_2m", "sde_3m"])
def test_energy_scale_of_the_sde_solvers(solver):
    """The result is linear in the injected noise, so equal steps of energy make equal differences."""
    out = [run(sigmas=SIGMAS[:2], params=CNSParams(energy_scale=e), solver=solver) for e in (0.5, 1.0, 1.5)]
    torch.testing.assert_close(out[1] - out[0], out[2] - out[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out[0], out[1])


def test_noise_is_drawn_before_a_callback_can_wait_for_the_device(monkeypatch):
    """A preview reads x0 and so waits for the model; the CPU's draw must not come after it."""
    events, draw = [], NoiseStreams.draw

    def recorded(self, *args):
        events.append("draw")
        return draw(self, *args)

    def watched(*args, **kwargs):
        events.append("model")
        return model(*args, **kwargs)

    monkeypatch.setattr(NoiseStreams, "draw", recorded)
    options = {"params": CNSParams(), "patch_size": 2, "seed": 11, "disable": True}
    sample_cns(watched, noise(), SIGMAS[[0, 4, 8]], callback=lambda _: events.append("callback"), **options)
    assert events == ["model", "draw", "callback", "model", "callback"]  # the last step, to 0, injects nothing


def test_the_default_dtype_of_torch_changes_nothing():
    x, expected = noise(), run()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(run(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("source", ["matrix", "approximation"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_device_of_torch_changes_nothing(solver, source):
    """Under meta a tensor made without a device has no values, so it would stop the run or change its result."""
    how = {"params": CNSParams(gamma_source=source), "solver": solver}
    x, expected = noise(), run(**how)
    reference = reference_progress(x, 2).values
    torch.set_default_device("meta")
    try:
        assert torch.equal(run(x, **how), expected)
        assert torch.equal(reference_progress(x, 2).values, reference)
        own = ProgressMatrix([[0.0, 0.0], [1.0, 1.0]], [0.0, 1.0])
        assert own.at(0.25, 2).tolist() == [0.25, 0.25]
    finally:
        torch.set_default_device(None)


class Copies(TorchDispatchMode):
    """Every copy to another device: (pinned source, asynchronous)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            self.seen.append((args[0].is_pinned(), bool(kwargs.get("non_blocking"))))
        return func(*args, **kwargs)


def test_pageable_memory_is_never_copied_asynchronously():
    """It is free again when the draw returns; MPS, XPU and DirectML then read what came after it."""
    with Copies() as copies:
        NoiseStreams(1, [0, 1]).draw(SHAPE, torch.device("meta"))
    assert copies.seen == [(False, False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("allowed", [True, False])
def test_cuda_copies_are_asynchronous_where_the_host_allows_pinned_memory(allowed):
    with Copies() as copies:
        NoiseStreams(1, [0, 1], pin_memory=allowed).draw(SHAPE, torch.device("cuda"))
    assert copies.seen == [(allowed, allowed)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_first_sigma_that_rounding_put_above_1_counts_as_1(solver):
    """``shift * t / (1 + (shift - 1) * t)`` in float32 at t = 1, as ComfyUI and diffusers compute it."""
    shifts = torch.linspace(0.1, 15.0, 1491)
    first = shifts * 1.0 / (1 + (shifts - 1) * 1.0)
    above = first[first > 1]
    assert len(above) > 5
    for sigma in (*above.unique().tolist(), 1.0000008, 1.000009):
        sigmas = torch.cat([torch.tensor([sigma]), SIGMAS[1:]])
        torch.testing.assert_close(run(sigmas=sigmas, solver=solver), run(solver=solver), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the 9 sigmas go from 1.00002 to 0"):
        run(sigmas=torch.cat([torch.tensor([1.00002]), SIGMAS[1:]]), solver=solver)


def test_energy_scale_scales_the_injected_noise_exactly():
    """One step to a sigma above 0: the difference to plain Euler is the injected noise alone."""
    plain = plain_euler(noise(), SIGMAS[:2])
    injected = {e: run(sigmas=SIGMAS[:2], params=CNSParams(energy_scale=e)) - plain for e in (0.5, 1.0, 1.5)}
    torch.testing.assert_close(injected[0.5], 0.5 * injected[1.0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(injected[1.5], 1.5 * injected[1.0], rtol=1e-4, atol=1e-5)
    std = 0.5 * SIGMAS[1] * (1 - (SIGMAS[1] / SIGMAS[0]) ** 2).sqrt()
    assert float(injected[1.0].std()) == pytest.approx(float(std), rel=0.02)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_of_a_batch_gets_the_noise_it_gets_alone(solver):
    x = noise((4, 128, 6, 7))
    together = run(x, solver=solver)
    for i in range(4):
        alone = run(x[i : i + 1], solver=solver, batch_index=[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    together, alone = NoiseStreams(11, range(4)), NoiseStreams(11, [2])
    for _ in range(3):
        drawn = together.draw((4, 128, 6, 7), torch.device("cpu"))
        assert torch.equal(drawn[2:3], alone.draw((1, 128, 6, 7), torch.device("cpu")))


@pytest.mark.parametrize("solver", SOLVERS)
def test_global_generators_neither_matter_nor_change(solver):
    torch.manual_seed(1)
    first = run(solver=solver)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = run(solver=solver)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, run(solver=solver, seed=12))


def test_streams_repeat_neither_the_initial_noise_nor_each_other():
    """torch's CPU engine keeps 32 bits of a seed, so seeds that differ only above them draw the same."""
    shape = (1, 4, 64, 64)
    cpu = torch.device("cpu")
    for seed in (0, 1, 2**32, 2**64 - 1):
        initial = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        draws = [initial, *(NoiseStreams(seed, [i]).draw(shape, cpu) for i in range(3))]
        draws.append(NoiseStreams(seed, [0], first_sigma=0.9).draw(shape, cpu))
        flat = torch.stack(draws).flatten(1)
        correlation = torch.corrcoef(flat) - torch.eye(len(flat))
        assert float(correlation.abs().max()) < 6 / flat.shape[1] ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True])
def test_a_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match=r"seed is .*0 to 18446744073709551615"):
        run(seed=seed)


def test_the_seed_comes_from_the_host_where_none_is_given():
    assert torch.equal(run(seed=None, extra_args={"seed": 11}), run(seed=11))
    assert torch.equal(run(seed=None), run(seed=0))


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_a_schedule_split_in_two_equals_one_run_with_the_same_noise(solver):
    """A tilt that does not move, since it runs over the steps of the schedule given; one stream through both halves."""
    params = CNSParams(alpha_tilt_end=0.15)
    x, halves = noise(), (SIGMAS[:4], SIGMAS[3:])
    streams = None
    for sigmas in halves:
        part = CNSRun(params, sigmas, x.shape, x.device, solver=solver, patch_size=2, seed=11)
        part._streams = streams = streams or part._streams
        for i in range(len(sigmas) - 1):
            x = part.step(i, x, model(x, sigmas[i].expand(len(x))))
    assert torch.equal(x, run(params=params, solver=solver))


def test_the_second_half_of_a_split_draws_its_own_noise():
    first = CNSRun(CNSParams(), SIGMAS[:4], SHAPE, torch.device("cpu"), patch_size=2, seed=11)
    second = CNSRun(CNSParams(), SIGMAS[3:], SHAPE, torch.device("cpu"), patch_size=2, seed=11)
    draws = [run._streams.draw(SHAPE, torch.device("cpu")) for run in (first, second)]
    assert abs(float((draws[0] * draws[1]).mean())) < 0.05


def test_a_schedule_that_does_not_end_at_zero_injects_at_its_end():
    cut = SIGMAS[:-1]
    assert not torch.allclose(run(sigmas=cut), plain_euler(noise(), cut))
    ended = run(sigmas=SIGMAS[-2:])
    assert torch.equal(ended, model(noise(), SIGMAS[-2].expand(2)))  # the step to 0 returns x0


def test_callback_and_extra_args_follow_k_diffusion():
    seen, passed = [], []

    def recording(x, sigma, **kwargs):
        passed.append((sigma, kwargs))
        return model(x, sigma)

    sample_cns(recording, noise(), SIGMAS, {"seed": 3, "own": 1}, seen.append, True, params=CNSParams(), patch_size=2)
    assert [event["i"] for event in seen] == list(range(8))
    assert set(seen[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    assert torch.equal(passed[2][0], SIGMAS[2].expand(2)) and passed[2][1] == {"seed": 3, "own": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_draws_the_same_noise(dtype):
    out = run(noise().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), run(), rtol=0.1, atol=0.1)


def test_wrong_input_is_a_sentence():
    with pytest.raises(ValueError, match="fall from at most 1"):
        run(sigmas=SIGMAS.flip(0))
    with pytest.raises(ValueError, match="flow-matching model"):
        run(sigmas=torch.tensor([14.6, 3.0, 0.0]))
    with pytest.raises(ValueError, match="fall from"):
        run(sigmas=torch.tensor([1.0, float("nan"), 0.0]))
    with pytest.raises(ValueError, match="batch_index has 1 entries for a batch of 2"):
        run(batch_index=[0])
    with pytest.raises(ValueError, match="'reference', which needs at least one reference picture"):
        run(params=CNSParams(gamma_source="reference"))
    with pytest.raises(ValueError, match="'approximation', which takes gamma = t"):
        run(params=CNSParams(gamma_source="approximation"), progress=shipped_progress())
    with pytest.raises(ValueError, match="multiple of 4"):
        run(noise((1, 6, 4, 4)))
    assert torch.equal(run(sigmas=SIGMAS[:1]), noise())


def test_nothing_in_a_step_waits_for_the_device():
    """The ops of a step on the meta device: it has no values, so any read of one (item, bool, copy back) raises."""
    for solver in SOLVERS:
        run_ = CNSRun(CNSParams(), SIGMAS, SHAPE, torch.device("meta"), solver=solver, patch_size=2)
        x = torch.empty(SHAPE, device="meta")
        for i in range(len(SIGMAS) - 1):
            x = run_.step(i, x, torch.empty_like(x))
        assert x.shape == SHAPE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", SOLVERS)
def test_cuda_draws_the_same_and_never_synchronises(solver):
    sigmas, x = SIGMAS.cuda(), noise().cuda()
    run_ = CNSRun(CNSParams(), sigmas, x.shape, x.device, solver=solver, patch_size=2, seed=11)
    run_.step(0, x, x)  # plans and caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_.step(1, x, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(run(x, sigmas, solver=solver).cpu(), run(solver=solver), rtol=1e-3, atol=1e-3)
