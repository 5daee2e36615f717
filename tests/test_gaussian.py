"""A Gaussian field is solvable in closed form: the tables of docs/sampling.md, from the real solvers and scheduler.

Field: power P(r) = (r + 0.03)^-1 or ^-2 on a 64x64 grid, scaled to mean 1. Its denoiser is linear per mode.
Error: relative squared Wasserstein distance, Σ(√V - √P)² / ΣP over the modes, powers averaged per band.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from klein_cns.klein import flux2_sigmas, log_snr_sigmas
from klein_cns.sampler import CNSParams, alpha_tilt, sample_cns, shipped_progress, spectral_gain
from klein_cns.sampler.scheduler import FlowMatchCNSScheduler
from klein_cns.sampler.solvers import Step, sde

GRID, TOKENS = 64, 4096
FLUX2_COLUMNS = [
    ("off", 0.0),
    ("euler", 0.5),
    ("euler", 1.0),
    ("sde", 0.5),
    ("sde_2m", 0.0),
    ("sde_2m", 0.5),
    ("sde_2m", 1.0),
    ("sde_2m", 2.0),
]
FLUX2_TABLE = {
    12: [
        (0.0947, 0.0843),
        (0.0539, 0.0533),
        (0.0046, 0.0143),
        (0.0991, 0.0873),
        (0.0667, 0.0626),
        (0.0688, 0.0638),
        (0.0755, 0.0676),
        (0.0981, 0.0804),
    ],
    20: [
        (0.0346, 0.0323),
        (0.0068, 0.0094),
        (0.0342, 0.0237),
        (0.0391, 0.0355),
        (0.0108, 0.0157),
        (0.0113, 0.0164),
        (0.0129, 0.0184),
        (0.0172, 0.0253),
    ],
    28: [
        (0.0171, 0.0161),
        (0.0003, 0.0013),
        (0.0831, 0.0581),
        (0.0206, 0.0187),
        (0.0017, 0.0044),
        (0.0016, 0.0046),
        (0.0016, 0.0053),
        (0.0026, 0.0088),
    ],
    50: [
        (0.0046, 0.0044),
        (0.0058, 0.0039),
        (0.1760, 0.1304),
        (0.0061, 0.0057),
        (0.0000, 0.0001),
        (0.0001, 0.0002),
        (0.0009, 0.0005),
        (0.0097, 0.0053),
    ],
}
LOG_SNR_COLUMNS = [
    ("off", 0.0),
    ("euler", 0.5),
    ("sde_2m", 0.0),
    ("sde_2m", 0.5),
    ("sde_2m", 1.0),
    ("sde_2m", 2.0),
    ("sde_3m", 0.0),
    ("sde_3m", 0.5),
    ("sde_3m", 1.0),
]
LOG_SNR_TABLE = {
    6: [
        (0.0823, 0.0851),
        (0.0451, 0.0544),
        (0.0043, 0.0053),
        (0.0060, 0.0065),
        (0.0126, 0.0110),
        (0.0337, 0.0246),
        (0.0213, 0.0201),
        (0.0244, 0.0242),
        (0.0292, 0.0342),
    ],
    8: [
        (0.0496, 0.0516),
        (0.0179, 0.0254),
        (0.0001, 0.0004),
        (0.0001, 0.0005),
        (0.0005, 0.0013),
        (0.0043, 0.0048),
        (0.0108, 0.0071),
        (0.0158, 0.0102),
        (0.0344, 0.0225),
    ],
    12: [
        (0.0243, 0.0254),
        (0.0027, 0.0074),
        (0.0002, 0.0002),
        (0.0004, 0.0003),
        (0.0008, 0.0007),
        (0.0012, 0.0019),
        (0.0002, 0.0002),
        (0.0004, 0.0003),
        (0.0022, 0.0019),
    ],
    28: [
        (0.0054, 0.0057),
        (0.0051, 0.0050),
        (0.0000, 0.0000),
        (0.0000, 0.0000),
        (0.0001, 0.0001),
        (0.0009, 0.0007),
        (0.0000, 0.0000),
        (0.0000, 0.0000),
        (0.0000, 0.0000),
    ],
}
CASES = [
    (schedule, steps, solver, churn, expected)
    for schedule, columns, table in (
        (flux2_sigmas, FLUX2_COLUMNS, FLUX2_TABLE),
        (log_snr_sigmas, LOG_SNR_COLUMNS, LOG_SNR_TABLE),
    )
    for steps, row in table.items()
    for (solver, churn), expected in zip(columns, row, strict=True)
]

FREQUENCY = np.fft.fftfreq(GRID).astype(np.float32)
RADIUS = np.sqrt(FREQUENCY[:, None] ** 2 + FREQUENCY[None, :] ** 2)
RADIUS = RADIUS / RADIUS.max()
BAND = (RADIUS * np.float32(31)).astype(int)
COUNT = np.bincount(BAND.ravel(), minlength=32)


def field_power(exponent: int) -> np.ndarray:
    power = (RADIUS.astype(np.float64) + 0.03) ** -exponent
    return power / power.mean()


def denoiser(power: torch.Tensor):
    """``model(x, sigma) -> x0`` of a Gaussian field with this power per mode."""
    half = power[:, : GRID // 2 + 1]

    def model(x, sigma, **_):
        s = sigma.view(-1, 1, 1, 1)
        return torch.fft.irfft2(torch.fft.rfft2(x) * ((1 - s) * half / ((1 - s) ** 2 * half + s**2)), s=x.shape[-2:])

    return model


def run_loop(params, solver, sigmas, model, x, seed):
    own = {"params": params, "solver": solver, "progress": shipped_progress(), "seed": seed}
    return sample_cns(model, x, sigmas, disable=True, **own)


def run_scheduler(params, solver, sigmas, model, x, seed):
    scheduler = FlowMatchCNSScheduler(solver=solver, **params.to_request())
    scheduler.set_sigmas(sigmas.numpy())
    scheduler.set_run(seed=seed)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        velocity = (x - model(x, sigma.expand(len(x)))) / sigma
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    return x


def matched_noise(channels: int, seed: int) -> torch.Tensor:
    """Unit noise [1, channels, GRID, GRID] whose power over the channels is 1 at every mode, not only in expectation.

    It takes the sampling error of the start out of the comparison; that of the injected noise remains.
    """
    spectrum = torch.fft.rfft2(torch.randn(1, channels, GRID, GRID, generator=torch.Generator().manual_seed(seed)))
    return torch.fft.irfft2(spectrum / spectrum.abs().square().mean(1, keepdim=True).sqrt() * GRID, s=(GRID, GRID))


def wasserstein(x: torch.Tensor, power: np.ndarray) -> float:
    measured = torch.fft.fft2(x, norm="ortho").abs().square().double().mean((0, 1)).numpy()
    v, p = (np.bincount(BAND.ravel(), values.ravel(), 32) / COUNT for values in (measured, power))
    return float((COUNT * (np.sqrt(v) - np.sqrt(p)) ** 2).sum() / (COUNT * p).sum())


@pytest.mark.parametrize("run", [run_loop, run_scheduler])
@pytest.mark.parametrize(("schedule", "steps", "solver", "churn", "expected"), CASES)
def test_table(run, schedule, steps, solver, churn, expected):
    params = CNSParams(enable_cns=solver != "off", s_churn=churn, energy_scale=1.0)
    solver = "euler" if solver == "off" else solver
    sigmas = torch.from_numpy(schedule(steps, TOKENS))
    for exponent, error in zip((1, 2), expected, strict=True):
        power = field_power(exponent)
        model = denoiser(torch.from_numpy(power).float())
        noise = matched_noise(256 if churn < 2 else 1024, steps)
        found = wasserstein(run(params, solver, sigmas, model, noise, seed=steps), power)
        assert abs(found - error) <= max(0.05 * error, 2e-4), f"power r^-{exponent}: {found:.5f}, the table has {error}"


@pytest.mark.parametrize("exponent", [1, 2])
def test_sde_keeps_every_marginal_in_the_limit_of_small_steps(exponent):
    """s_churn 1, energy 1, an unshifted schedule of 2000 steps: every band's variance ends within 1% of its power.

    No sampling error: each step of the real solver is linear, so its response to x and to noise, mode by mode,
    carries the variance exactly.
    """
    power = field_power(exponent)
    params = CNSParams(s_churn=1.0, energy_scale=1.0)
    sigmas = np.linspace(1, 0, 2001)
    impulse = torch.zeros(1, 1, GRID, GRID, dtype=torch.float64)
    impulse[..., 0, 0] = 1.0  # its spectrum is 1 at every mode
    variance = np.ones((GRID, GRID))
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas[:-1])):
        gain = spectral_gain(params, shipped_progress().at(1 - sigma, 32), alpha_tilt(params, i, 2000), GRID, GRID)
        step = Step(sigma, sigma_next, 1.0, 1.0, 1, impulse.float(), gain, ())
        denoise = torch.from_numpy((1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2))
        predicted = torch.fft.ifft2(torch.fft.fft2(impulse) * denoise).real
        silent = step._replace(white=torch.zeros(1, 1, GRID, GRID))
        carried = torch.fft.fft2(sde(impulse, predicted, silent)).real[0, 0].numpy()
        zero = torch.zeros_like(impulse)
        injected = torch.fft.fft2(sde(zero, zero, step)).real[0, 0].numpy()
        variance = carried**2 * variance + injected**2
    last = sigmas[-2]
    variance *= ((1 - last) * power / ((1 - last) ** 2 * power + last**2)) ** 2
    ratio = np.bincount(BAND.ravel(), variance.ravel(), 32) / np.bincount(BAND.ravel(), power.ravel(), 32)
    assert np.abs(ratio - 1).max() < 0.01
