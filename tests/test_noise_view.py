"""The numbers of the picture on the node, against the solvers' own steps, waves of known length and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from klein_cns.sampler import CNSParams, ProgressMatrix
from klein_cns.sampler.noise_view import MOST_COLUMNS, band_radius, noise_view
from klein_cns.sampler.progress import resolve_progress
from klein_cns.sampler.solvers import SOLVERS, Step
from klein_cns.sampler.spectrum import radial_bands

SIGMAS = [1.0, 0.93, 0.7, 0.31, 0.0]
GRID = (24, 40)
NOTHING_RESOLVED = ProgressMatrix(torch.zeros(2, 2), torch.tensor([0.0, 1.0]))


def view_of(params=None, sigmas=SIGMAS, grid=GRID, solver="euler", progress=None, cell=8):
    return noise_view(params or CNSParams(), sigmas, grid, solver=solver, progress=progress, cell=cell)


@pytest.mark.parametrize("s_churn", [0.5, 1.7])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_noise_is_what_the_solvers_step_adds(solver, s_churn):
    """From a latent and a prediction of zero, a step leaves its noise alone. A point of white noise has every mode."""
    params = CNSParams(s_churn=s_churn)
    view = view_of(params, solver=solver)
    index, modes = radial_bands(*GRID, params.num_freq_bins)
    point = torch.zeros(1, 1, *GRID, dtype=torch.float64)
    point[..., 0, 0] = 1.0
    for i, power in enumerate(view.power[:-1]):
        step = Step(SIGMAS[i], SIGMAS[i + 1], s_churn, params.energy_scale, 1, point, power.sqrt()[index], previous=[])
        added = SOLVERS[solver].step(torch.zeros_like(point), torch.zeros_like(point), step)
        response = torch.fft.rfft2(added)[0, 0].abs().square()
        variance = SOLVERS[solver].variance(SIGMAS[i], SIGMAS[i + 1], s_churn, power) * params.energy_scale**2
        torch.testing.assert_close(response, variance[index], rtol=2e-6, atol=1e-9)  # noise is filtered in float32
        assert float(view.std[i]) == pytest.approx(math.sqrt((variance * modes).sum() / modes.sum()))
        whole = torch.fft.fft2(added)[0, 0].abs().square().mean()  # every mode once
        assert float(view.std[i]) == pytest.approx(float(whole.sqrt()), rel=2e-6)
    assert float(view.std[-1]) == 0.0


def test_white_noise_is_1_everywhere_and_its_amount_is_the_closed_form():
    params = CNSParams(alpha_tilt_start=0.0, alpha_tilt_end=0.0)
    view = view_of(params, progress=NOTHING_RESOLVED)
    torch.testing.assert_close(view.power[:, view.modes > 0], torch.ones_like(view.power)[:, view.modes > 0])
    wanted = [
        params.energy_scale * params.s_churn * after * math.sqrt(1 - (after / before) ** 2)
        for before, after in pairwise(SIGMAS)
    ]
    assert view.std.tolist() == pytest.approx(wanted)


def test_gamma_is_the_matrix_at_each_step():
    params = CNSParams()
    progress = resolve_progress(params, None)
    view = view_of(params)
    for i, sigma in enumerate(SIGMAS[:-1]):
        torch.testing.assert_close(view.gamma[i], progress.at(1 - sigma, params.num_freq_bins).double())


@pytest.mark.parametrize("cell", [8.0, 16.0])
@pytest.mark.parametrize(("grid", "bins"), [((128, 128), 32), ((96, 160), 32), ((64, 48), 8), ((128, 128), 128)])
def test_a_wave_lies_in_the_band_of_its_length(grid, bins, cell):
    """Waves along the rows, of n periods: their band's wavelength is theirs to within a band."""
    view = view_of(CNSParams(num_freq_bins=bins), grid=grid, cell=cell)
    index, _ = radial_bands(*grid, bins)
    width = float(band_radius(*grid, bins)[1] * 2 / 3)  # of a band, in cycles a cell
    for periods in range(1, grid[1] // 2):
        frequency = periods / grid[1]
        found = 1 / float(view.wavelengths[index[0, periods]]) * cell
        assert abs(found - frequency) <= width / 2 + 1e-6 or index[0, periods] == 0
    assert math.isinf(view.wavelengths[0])
    corner = math.hypot((grid[0] // 2) / grid[0], (grid[1] // 2) / grid[1])
    assert float(view.wavelengths[-1]) == pytest.approx(cell / corner)


def test_every_mode_of_the_grid_is_counted_once():
    assert view_of(grid=(17, 22)).modes.sum() == 17 * 22


def test_a_long_schedule_shows_its_first_and_last_step():
    sigmas = [1 - i / 1000 for i in range(1001)]
    view = view_of(sigmas=sigmas)
    assert len(view.steps) == len(view.power) == len(view.std) == MOST_COLUMNS
    assert (view.steps[0], view.steps[-1]) == (0, 999) and sorted(set(view.steps)) == view.steps
    whole = view_of(sigmas=sigmas[view.steps[7] : view.steps[7] + 2])
    torch.testing.assert_close(view.gamma[7], whole.gamma[0])
    assert view.sigmas == sigmas


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="solver is 'heun'; allowed are euler, sde"):
        view_of(solver="heun")
