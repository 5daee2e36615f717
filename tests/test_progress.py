"""γ: the shipped fits, lookup, files, and the reference measure."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from klein_cns.sampler import ProgressMatrix, reference_progress, shipped_progress
from klein_cns.sampler.gamma_fits import FITS
from klein_cns.sampler.progress import approximation


@pytest.mark.parametrize("name", list(FITS))
def test_shipped_fits_are_small_and_close_to_the_published_matrices(name, published):
    assert sum(len(values) for values in FITS[name].values()) <= 100
    error = shipped_progress(name).values - published[name].double()
    assert float(error.square().mean().sqrt()) <= 0.02
    assert float(error[10:].square().mean().sqrt()) <= 0.01  # after the start-up transient of the measurement


@pytest.mark.parametrize("name", list(FITS))
def test_shipped_progress_rises_from_zero_to_one(name):
    values = shipped_progress(name).values
    assert bool((values.diff(dim=0) >= 0).all())
    assert bool((values[0] == 0).all()) and bool((values[-1] == 1).all())


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'nope' is not shipped; shipped are sit_xl2_unguided"):
        shipped_progress("nope")


def test_lookup_is_by_flow_time_and_linear():
    matrix = ProgressMatrix(torch.tensor([[0.0, 0.0], [0.5, 0.1], [1.0, 1.0]]), torch.tensor([0.0, 0.8, 1.0]))
    torch.testing.assert_close(matrix.at(0.4, 2), torch.tensor([0.25, 0.05]))
    torch.testing.assert_close(matrix.at(0.9, 2), torch.tensor([0.75, 0.55]))
    torch.testing.assert_close(matrix.at(0.8, 3), torch.tensor([0.5, 0.3, 0.1]))
    torch.testing.assert_close(matrix.at(-0.1, 2), matrix.at(0.0, 2))
    torch.testing.assert_close(approximation().at(0.37, 9), torch.full((9,), 0.37, dtype=torch.float64))


def test_bands_are_resampled_by_normalised_radius(seed):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.random((50, 32)), axis=0)
    matrix = ProgressMatrix(torch.from_numpy(values), torch.linspace(0, 1, 50, dtype=torch.float64))
    for bins in (8, 32, 63, 128):
        for t in rng.random(5):
            row = [np.interp(t, np.linspace(0, 1, 50), values[:, k]) for k in range(32)]
            expected = np.interp(np.linspace(0, 1, bins), np.linspace(0, 1, 32), row)
            np.testing.assert_allclose(matrix.at(t, bins).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "t", "says"),
    [
        (torch.zeros(4), torch.linspace(0, 1, 4), r"shape \[4\]"),
        (torch.zeros(4, 8), torch.linspace(0, 1, 5), r"shape \[4, 8\] and t \[5\]"),
        (torch.full((4, 8), torch.nan), torch.linspace(0, 1, 4), "finite and from 0 to 1"),
        (torch.full((4, 8), 1.2), torch.linspace(0, 1, 4), "Found 1.2"),
        (torch.zeros(4, 8), torch.tensor([0.0, 0.5, 0.5, 1.0]), "must rise"),
        (torch.zeros(2, 8), torch.tensor([0.0, 2.0]), "must rise within 0 to 1"),
    ],
)
def test_a_matrix_that_is_none_is_refused(values, t, says):
    with pytest.raises(ValueError, match=says):
        ProgressMatrix(values, t)


def test_files(tmp_path):
    matrix = shipped_progress()
    matrix.save(tmp_path / "gamma.safetensors")
    loaded = ProgressMatrix.load(tmp_path / "gamma.safetensors")
    assert torch.equal(loaded.values, matrix.values) and torch.equal(loaded.t, matrix.t)
    torch.save(matrix.values.float(), tmp_path / "gamma.pt")
    torch.testing.assert_close(ProgressMatrix.load(tmp_path / "gamma.pt").at(0.3, 32).double(), matrix.at(0.3, 32))


def test_bad_files_are_named_and_nothing_in_a_pickle_is_run(tmp_path):
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print, protocol=2))
    torch.save({"a": 1}, tmp_path / "dict.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.txt").write_text("1 2 3")
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for name in ("code.pt", "dict.pt", "empty.safetensors", "text.txt", "other.safetensors", "missing.pt"):
        with pytest.raises(ValueError, match=f"progress file {name} cannot be used: .*Needed is a .safetensors"):
            ProgressMatrix.load(tmp_path / name)


def band_index(height, width, bins):
    fy, fx = np.fft.fftfreq(height).astype(np.float32), np.fft.fftfreq(width).astype(np.float32)
    radius = np.sqrt(fy[:, None] ** 2 + fx[None, :] ** 2)
    return (radius / radius.max() * np.float32(bins - 1)).astype(int)


def test_reference_progress_is_the_authors_measure_on_an_exact_ode_run(seed):
    """A field whose every mode has its band's power exactly: then x̂0 and x_final of the exact ODE are known."""
    rng = np.random.default_rng(seed)
    index = band_index(64, 64, 32)
    power = (np.linspace(0, 1, 32) + 0.03) ** -2.0
    power /= power[index].mean()
    phase = np.fft.fft2(rng.standard_normal((64, 64)))
    field = np.fft.ifft2(phase / np.abs(phase) * np.sqrt(power[index]) * 64).real  # |orthonormal FFT|² = power
    matrix = reference_progress(torch.from_numpy(field)[None, None], patch_size=1)
    final = np.fft.fft2(field, norm="ortho")
    for t in np.concatenate([[0.0, 1.0], rng.random(20), rng.random(10) * 0.05]):
        variance = t**2 * power[index] + (1 - t) ** 2
        x = final * np.sqrt(variance / power[index])  # the probability-flow ODE keeps x / sqrt(variance)
        x0 = t * power[index] / variance * x
        measure = 1 - np.abs(x0 - final) ** 2 / np.abs(final) ** 2
        expected = np.bincount(index.ravel(), measure.ravel(), 32) / np.bincount(index.ravel(), minlength=32)
        np.testing.assert_allclose(matrix.at(t, 32).numpy(), expected, atol=2e-3)


def test_reference_progress_of_several_sizes_channels_and_silence():
    generator = torch.Generator().manual_seed(1)
    references = [torch.randn(1, 128, 20, 30, generator=generator), torch.randn(1, 128, 7, 5, generator=generator)]
    white = reference_progress(references, patch_size=2)
    t, sigma = 0.5, 0.5
    w = t**2 / (t**2 + sigma**2)  # P = 1
    np.testing.assert_allclose(white.at(t, 32)[2:-2].numpy(), 2 * np.sqrt(w) - w, atol=0.05)
    assert bool((reference_progress(torch.zeros(1, 128, 4, 4), 2).values == 0).all())
    with pytest.raises(ValueError, match="at least one reference latent"):
        reference_progress([], 2)
    with pytest.raises(ValueError, match="NaN"):
        reference_progress(torch.full((1, 128, 4, 4), torch.nan), 2)
