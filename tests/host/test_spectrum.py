"""CNS Spectrum on a real ComfyUI."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy_graph import failure, give, made, node
from klein_cns.klein.references import to_pixels
from klein_cns.sampler import half_octave_spectrum, unpatchify
from PIL import Image


def measuring(name, **inputs):
    """CNS Spectrum over tensors that `give` has put on the server."""
    names = [value for key, value in inputs.items() if not key.startswith("label")]
    loads = {f"load{i}": node("ProbeLoad", name=value) for i, value in enumerate(names)}
    links = {}
    for key, value in inputs.items():
        links[key] = [f"load{names.index(value)}", 2 if key.startswith("latent") else 0] if value in names else value
    return loads | {
        "spectrum": node("CNSSpectrum", **links),
        "save": node("ProbeSave", name=name, image=["spectrum", 0]),
        "table": node("PreviewAny", source=["spectrum", 1]),
    }


def table(entry):
    lines = [line.split("\t") for line in entry["outputs"]["table"]["text"][0].splitlines()]
    return lines[0], {float(line[0]): line[1:] for line in lines[1:]}


def test_two_pictures_and_a_latent(server, photo):
    """The numbers are the core's, the plot is on the node and goes out as a picture."""
    one, other = (to_pixels(photo.resize(size)).movedim(1, -1) for size in ((256, 160), (120, 100)))
    pair = torch.cat([other, other.flip(1)])
    latent = torch.randn(1, 128, 12, 16, generator=torch.Generator().manual_seed(1))
    for name, tensor in (("one", one), ("pair", pair), ("packed", latent)):
        give(server, name, tensor)
    prompt = measuring("spectrum", image_1="one", image_3="pair", latent_2="packed", label_image_3="two  of\tthem")
    entry = server.run(prompt)
    header, rows = table(entry)
    assert header == [
        "wavelength in pixels", "power of picture 1", "power of two of them", "power of latent 2",
        "dB of two of them against picture 1",
    ]  # fmt: skip
    expected = [
        half_octave_spectrum(one.movedim(-1, 1)),
        half_octave_spectrum(pair.movedim(-1, 1)),
        half_octave_spectrum(unpatchify(latent, 2), 8),
    ]
    for column, spectrum in enumerate(expected):
        found = {round(2 * np.log2(wave)): float(row[column]) for wave, row in rows.items() if row[column] != "-"}
        assert found == pytest.approx(spectrum, rel=1e-4)
    [shown] = entry["outputs"]["spectrum"]["images"]
    seen = np.asarray(Image.open(server.base / "temp" / shown["subfolder"] / shown["filename"]).convert("RGB"))
    plot = made(server, "spectrum")
    assert plot.shape == (1, 1024, 1024, 3)
    np.testing.assert_allclose(seen / 255.0, plot[0].numpy(), atol=0.003)


def test_refusals_are_sentences(server):
    for name, tensor in (
        ("tiny", torch.zeros(1, 5, 64, 3)), ("broken", torch.full((1, 16, 16, 3), torch.nan)),
        ("sound", torch.zeros(1, 64, 100)), ("flat", torch.ones(1, 64, 96, 1)),
    ):  # fmt: skip
        give(server, name, tensor)
    for inputs, says in (
        ({}, "nothing is connected to CNS Spectrum; connect a picture or a latent."),
        ({"image_2": "tiny"}, "picture 2 has no spectrum: it is 64x5; a spectrum needs at least 8 on each side."),
        ({"image_1": "broken"}, "picture 1 has no spectrum: it holds NaN"),
        ({"latent_1": "sound"}, "latent 1 is [1, 64, 100]; a latent with a spectrum is [batch, channels"),
        ({"image_4": "flat"}, "picture 4 is [1, 64, 96, 1]; a picture is"),
    ):
        assert says in failure(server, measuring("refused", **inputs))
