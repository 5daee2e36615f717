"""CNS Spectrum: the measured power per wavelength of pictures and latents, as a plot and as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..klein.references import to_pixels
from ..klein.spectrum_plot import Curve, as_table, plot
from ..sampler.measure import half_octave_spectrum
from ..sampler.spectrum import unpatchify
from .common import CATEGORY, FLUX2_CHANNELS
from .messages import SAYS
from .pictures import channels_first

PICTURES, LATENTS = 4, 2
LATENT_CELL = 8  # pixels of a cell of an unpatchified latent


class CNSSpectrum(io.ComfyNode):
    """Pictures and latents in; their spectra as a plot and as a table out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNSSpectrum",
            display_name="CNS Spectrum",
            category=CATEGORY,
            description="Measures how much power pictures and latents have at each wavelength, and plots them and "
            "their differences in dB: CNS on and off, local and fal.",
            search_aliases=["spectrum", "power spectrum", "fft", "frequency", "compare images", "noise spectrum"],
            inputs=[
                *(
                    io.Image.Input(
                        f"image_{i}",
                        display_name=f"picture {i}",
                        optional=True,
                        tooltip="A picture to measure; of a batch, the mean. The others are compared with the first "
                        "connected one. Sizes may differ.",
                    )
                    for i in range(1, PICTURES + 1)
                ),
                *(
                    io.Latent.Input(
                        f"latent_{i}",
                        display_name=f"latent {i}",
                        optional=True,
                        tooltip="A latent to measure; of a batch, the mean. Latents are compared with the first "
                        "connected latent. Those of FLUX.2 are unpatchified; a cell counts as 8 pixels.",
                    )
                    for i in range(1, LATENTS + 1)
                ),
                *(
                    io.String.Input(
                        f"label_{kind}_{i}",
                        display_name=f"label of {name} {i}",
                        default="",
                        optional=True,
                        tooltip=f"What the plot and the table call {name} {i}; empty: its own name.",
                    )
                    for kind, name, count in (("image", "picture", PICTURES), ("latent", "latent", LATENTS))
                    for i in range(1, count + 1)
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The plot, 1024 x 1024."),
                io.String.Output(
                    display_name="table",
                    tooltip="Lines of values between tabs: wavelength in pixels, power of each, dB against the first.",
                ),
            ],
            is_output_node=True,
            **SAYS,
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        connected = _connected(given)
        if not connected:
            raise ValueError("nothing is connected to CNS Spectrum; connect a picture or a latent.")
        bar = comfy.utils.ProgressBar(sum(planes[..., 0, 0].numel() for *_, planes in connected))
        curves = []
        for kind, name, label, planes in connected:
            try:
                power = half_octave_spectrum(planes, LATENT_CELL if kind == "latent" else 1, lambda: bar.update(1))
            except ValueError as error:
                raise ValueError(f"{name} has no spectrum: {error}") from None
            curves.append(Curve(name, label or name, kind, power))
        picture = to_pixels(plot(curves)).movedim(1, -1)
        return io.NodeOutput(picture, as_table(curves), ui=ui.PreviewImage(picture, cls=cls))


def _connected(given: Mapping[str, Any]) -> list[tuple[str, str, str, Tensor]]:
    """(kind, name, label, planes [..., H, W]) of each connected input, pictures first."""
    found = []
    for i in range(1, PICTURES + 1):
        image = given.get(f"image_{i}")
        if image is not None:
            planes = channels_first(f"picture {i}", image)
            found.append(("picture", f"picture {i}", _label(given, f"label_image_{i}"), planes))
    for i in range(1, LATENTS + 1):
        latent = given.get(f"latent_{i}")
        if latent is not None:
            planes = _planes(f"latent {i}", latent["samples"])
            found.append(("latent", f"latent {i}", _label(given, f"label_latent_{i}"), planes))
    return found


def _label(given: Mapping[str, Any], name: str) -> str:
    return " ".join(str(given.get(name) or "").split())


def _planes(name: str, samples: Tensor) -> Tensor:
    """Samples on their true grid; FLUX.2's are unpatchified.

    Raises:
        ValueError: they have no height and width.
    """
    if getattr(samples, "is_nested", False) or samples.ndim < 4:
        raise ValueError(
            f"{name} is {'several tensors' if samples.is_nested else list(samples.shape)}; a latent with a spectrum is "
            "[batch, channels, ..., height, width]. Connect the latent of a picture or of a video."
        )
    packed = samples.ndim == 4 and samples.shape[1] == FLUX2_CHANNELS
    return unpatchify(samples, 2 if packed else 1)
