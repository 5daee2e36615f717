"""``klein-cns demo``: the whole path on random weights, and a picture of what CNS does to the noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

STEPS = 28


def run(folder: Path, seed: int) -> None:
    """Edit a photograph with the tiny klein, without and with CNS, and plot γ and β² per step and band.

    Args:
        folder: takes the pictures and the plot; it is made where it is missing.
        seed: starts the noise, 0 to 2^64 - 1.

    Raises:
        ValueError: the photograph or the plotting library is not installed.
    """
    try:
        import matplotlib
        from skimage import data
    except ImportError as error:
        raise ValueError(
            f"the demo needs the package {error.name}; run it as `uv run klein-cns demo` in the project's folder, "
            "or install scikit-image and matplotlib."
        ) from error
    from PIL import Image

    from ..sampler import CNSParams
    from .pipeline import KleinPipeline
    from .schedules import flux2_sigmas
    from .sizes import latent_size

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(data.chelsea())
    photo.save(folder / "input.png")
    print("The tiny klein has random weights: it shows that everything runs, and makes noise, not pictures.")
    pipeline = KleinPipeline.from_pretrained("tiny")
    for name, cns in (("edit_without_cns", CNSParams(enable_cns=False)), ("edit_with_cns", CNSParams())):
        result = pipeline(
            "Turn the cat into a lion.", [photo], seed=seed, num_inference_steps=STEPS, cns=cns, show_progress=True
        )
        print(*result.save(folder / f"{name}.png"))
    size = latent_size(1024, 1024)
    plot_spectrum(folder / "spectrum.png", flux2_sigmas(STEPS, size[0] * size[1]), size)
    print(folder / "spectrum.png")


def plot_spectrum(path: Path, sigmas: np.ndarray, size: tuple[int, int]) -> None:
    """Plot γ and β² per step and band at the endpoint's defaults and at the authors' guided preset.

    Args:
        path: names the picture to write.
        sigmas: [steps + 1], fall from 1 to 0.
        size: gives (h, w) of the latent.
    """
    from matplotlib import pyplot as plt

    from ..sampler import CNSParams, shipped_progress
    from ..sampler.params import GAMMA_FILE
    from ..sampler.sampling import power_table
    from ..sampler.spectrum import radial_bands
    from .presets import preset

    values = preset("paper, guided")
    values.pop(GAMMA_FILE)  # all panels show one γ
    guided = CNSParams.from_endpoint(values)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels: list[tuple[Any, ...]] = [
        ("γ: how far each band is resolved", progress_table(sigmas), "viridis", (0, 1), None)
    ]
    count = radial_bands(2 * size[0], 2 * size[1], guided.num_freq_bins)[1]
    for name, params in (("β² at the endpoint's defaults", CNSParams()), ("β² at the authors' guided preset", guided)):
        table = power_table(params, shipped_progress(), sigmas.tolist(), count).numpy()
        panels.append((name, table, "RdBu_r", (-1, 1), "log2"))
    for axis, (title, table, colors, limits, scale) in zip(axes, panels, strict=True):
        shown = np.log2(np.maximum(table, 2.0**-8)) if scale else table
        image = axis.imshow(shown.T, origin="lower", aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1])
        axis.set(title=title, xlabel="step (28, klein's schedule at 1024x1024)", ylabel="radial frequency band")
        bar = figure.colorbar(image, ax=axis, extend="both" if scale else "neither")
        if scale:
            bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["½", "0.7", "1 = white", "1.4", "2"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def progress_table(sigmas: np.ndarray) -> np.ndarray:
    """The shipped γ [steps, 32] over a schedule."""
    from ..sampler import shipped_progress

    return np.stack([shipped_progress().at(1.0 - float(sigma), 32).numpy() for sigma in sigmas[:-1]])
