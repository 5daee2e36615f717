"""FlowMatchCNSScheduler: a real diffusers scheduler, inside the real Flux2KleinPipeline."""

from __future__ import annotations

import inspect
import json
import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from klein_cns.klein import flux2_sigmas
from klein_cns.sampler import CNSParams, sample_cns
from klein_cns.sampler.scheduler import FlowMatchCNSScheduler

CALL = {
    "prompt": "a red square",
    "height": 64,
    "width": 96,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "output_type": "latent",
}


@pytest.fixture
def pipe(pipeline):
    """The tiny Flux2KleinPipeline with its own scheduler, restored afterwards."""
    pipe = pipeline.pipe
    pipe.set_progress_bar_config(disable=True)
    original = pipe.scheduler
    yield pipe
    pipe.scheduler = original


def call(pipe, scheduler=None, **changes):
    if scheduler is not None:
        pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 128, 4, 6, generator=generator)
    return pipe(**{**CALL, "latents": latents, **changes}).images


def cns(pipe, **config):
    scheduler = FlowMatchCNSScheduler.from_config(pipe.scheduler.config, **config)
    scheduler.set_run(seed=3, latent_size=(4, 6))
    return scheduler


def test_config_is_cnsparams():
    signature = inspect.signature(FlowMatchCNSScheduler.__init__).parameters
    for name, value in CNSParams().to_request().items():
        assert signature[name].default == value
    parent = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    for name in set(parent) & set(signature) - {"self"}:
        assert signature[name].default == parent[name].default
    with pytest.raises(ValueError, match="cns_s_churn is 5"):
        FlowMatchCNSScheduler(cns_s_churn=5.0)


@pytest.mark.parametrize(
    "config",
    [
        {"cns_s_churn": 0.0},
        {"cns_s_churn": 0.0, "solver": "sde"},
        {"enable_cns": False, "solver": "sde"},
    ],
)
def test_without_churn_it_is_the_plain_pipeline_bit_for_bit(pipe, photo, config):
    picture = photo.crop((0, 0, 96, 64))
    for image in (None, [picture], [picture, picture.rotate(180)]):
        assert torch.equal(call(pipe, image=image), call(pipe, cns(pipe, **config), image=image))


@pytest.mark.parametrize("solver", ["euler", "sde", "sde_2m", "sde_3m"])
def test_a_step_is_sample_cns(solver, seed):
    """The scheduler on packed tokens and the k-diffusion loop on the grid, same denoiser, same noise."""
    params = CNSParams(s_churn=0.8)
    sigmas = torch.from_numpy(flux2_sigmas(6, 20))
    x = torch.randn(2, 128, 4, 5, generator=torch.Generator().manual_seed(seed))

    def model(latent, sigma, **_):
        return torch.tanh(latent * (1 - sigma.view(-1, 1, 1, 1)))

    expected = sample_cns(model, x, sigmas, disable=True, params=params, solver=solver, patch_size=2, seed=seed)
    scheduler = FlowMatchCNSScheduler(solver=solver, **params.to_request())
    scheduler.set_sigmas(sigmas)
    scheduler.set_run(seed=seed, latent_size=(4, 5))
    tokens = x.flatten(2).transpose(1, 2)
    for i, timestep in enumerate(scheduler.timesteps):
        latent = tokens.transpose(1, 2).unflatten(2, (4, 5))
        velocity = (latent - model(latent, sigmas[i].expand(2))) / sigmas[i]
        tokens = scheduler.step(velocity.flatten(2).transpose(1, 2), timestep, tokens).prev_sample
    torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, (4, 5)), expected, rtol=1e-4, atol=1e-4)


def test_in_the_pipeline_runs_are_repeatable_and_seeds_differ(pipe):
    first, again = call(pipe, cns(pipe)), call(pipe, cns(pipe))
    assert torch.equal(first, again)
    assert torch.equal(first, call(pipe))  # set_timesteps restarts the streams
    pipe.scheduler.set_run(seed=4, latent_size=(4, 6))
    assert not torch.equal(first, call(pipe))


def test_save_and_load(pipe, tmp_path):
    scheduler = cns(pipe, cns_s_churn=0.7, solver="sde", cns_num_freq_bins=16)
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["_class_name"] == "FlowMatchCNSScheduler" and config["cns_s_churn"] == 0.7
    loaded = FlowMatchCNSScheduler.from_pretrained(tmp_path)
    assert loaded.params == scheduler.params == CNSParams(s_churn=0.7, num_freq_bins=16)
    assert loaded.config.solver == "sde"
    back = FlowMatchEulerDiscreteScheduler.from_config(loaded.config)
    assert torch.equal(call(pipe, back), call(pipe, cns(pipe, enable_cns=False)))


def test_a_pipeline_saved_with_it_loads(pipe, tmp_path):
    pipe.scheduler = cns(pipe, cns_s_churn=0.7)
    pipe.save_pretrained(tmp_path)
    loaded = Flux2KleinPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, FlowMatchCNSScheduler)
    assert loaded.scheduler.params == CNSParams(s_churn=0.7)


def test_step_has_the_parents_parameters():
    parent = inspect.signature(FlowMatchEulerDiscreteScheduler.step).parameters
    assert list(inspect.signature(FlowMatchCNSScheduler.step).parameters) == list(parent)
    scheduler = FlowMatchCNSScheduler()
    scheduler.set_timesteps(2)
    x = torch.ones(1, 16, 4, 4)
    with pytest.raises(ValueError, match="CNS needs one sigma for all tokens"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=torch.ones(1, 16))
    with pytest.raises(ValueError, match="seed is -1"):
        scheduler.set_run(seed=-1)


def test_packed_tokens_without_their_size(pipe):
    scheduler = FlowMatchCNSScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"24 packed tokens .*set_run\(latent_size"):
        call(pipe, scheduler)
    square = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="square of 4x4"):
        call(pipe, scheduler, latents=square, height=64, width=64)
    scheduler.set_run(latent_size=(5, 5))
    with pytest.raises(ValueError, match="5x5 = 25 tokens, the sample has 24"):
        call(pipe)


def test_an_unpacked_pipeline_needs_no_size(seed):
    """Grids [B, C, H, W], as Stable Diffusion 3 and video models pass them."""
    for shape in ((2, 16, 8, 12), (1, 16, 3, 8, 12)):
        scheduler = FlowMatchCNSScheduler(shift=3.0)
        scheduler.set_timesteps(5)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for timestep in scheduler.timesteps:
                x = scheduler.step(0.3 * x, timestep, x).prev_sample
        assert x.shape == shape and bool(x.isfinite().all())


@pytest.mark.parametrize("shift", [0.54, 0.55, 1.0, 2.02, 3.0])
def test_a_shift_that_rounds_the_first_sigma_above_1(shift):
    """At 0.54 it is 1.0000001."""
    scheduler = FlowMatchCNSScheduler(shift=shift)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        x = scheduler.step(0.3 * x, timestep, x).prev_sample
    assert bool(x.isfinite().all())


def test_the_default_device_of_torch_changes_nothing():
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))

    def run():
        scheduler = FlowMatchCNSScheduler()
        scheduler.set_sigmas([1.0, 0.8, 0.4, 0.0])
        latent = x
        for timestep in scheduler.timesteps:
            latent = scheduler.step(0.3 * latent, timestep, latent).prev_sample
        return latent

    expected = run()
    torch.set_default_device("meta")
    try:
        assert torch.equal(run(), expected)
    finally:
        torch.set_default_device(None)


def test_img2img_starts_within_the_schedule(seed):
    scheduler = FlowMatchCNSScheduler()
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    expected = sample_cns(
        lambda x, sigma: x - sigma.view(-1, 1, 1, 1) * 0.3, x, scheduler.sigmas[2:], disable=True, params=CNSParams()
    )
    for timestep in scheduler.timesteps[2:]:
        x = scheduler.step(torch.full_like(x, 0.3), timestep, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_latents_keep_their_dtype():
    scheduler = FlowMatchCNSScheduler()
    scheduler.set_timesteps(3)
    scheduler.set_run(latent_size=(4, 4))
    x = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for timestep in scheduler.timesteps:
        x = scheduler.step(x * 0.1, timestep, x).prev_sample
    assert x.dtype == torch.bfloat16
