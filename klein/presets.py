"""Presets: named sets of parameters, each with its source. The one list that the command, Python and the nodes read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..sampler.gamma_fits import GUIDED, UNGUIDED
from ..sampler.params import GAMMA_FILE, GUIDED_DIVIDER, GUIDED_ENERGY, CNSParams


class Preset(NamedTuple):
    """Values under their public names; what a preset leaves out stays as it is.

    ``values``: of `KleinRequest` and the ``cns_`` names. ``source``: where they come from, a sentence for the user.
    """

    values: Mapping[str, Any]
    source: str


def _cns(gamma_file: str, **changed: Any) -> dict[str, Any]:
    """Every CNS parameter, so that nothing of an earlier choice is left."""
    return {**CNSParams(**changed).to_request(), GAMMA_FILE: gamma_file}


_ENDPOINT = {"num_inference_steps": 28, "guidance_scale": 5.0, "solver": "euler", "scheduler": "flux2"}

PRESETS: dict[str, Preset] = {
    "endpoint": Preset(
        {**_ENDPOINT, **_cns(UNGUIDED)},
        "The defaults of fal-ai/flux-2/klein/9b/base/edit/lora, with Colored Noise Sampling on.",
    ),
    "endpoint, guided": Preset(
        {**_ENDPOINT, **_cns(UNGUIDED, gamma_divider=GUIDED_DIVIDER, energy_scale=GUIDED_ENERGY)},
        "The endpoint's defaults with the divider and the energy that it advises for a base model.",
    ),
    "paper, unguided": Preset(
        {"solver": "sde", **_cns(UNGUIDED, s_churn=1.0, formula="authors")},
        "The authors' best run without guidance (arXiv:2605.30332): SiT-XL/2 at ImageNet 256, 250 steps. "
        "Steps, guidance and schedule stay yours.",
    ),
    "paper, guided": Preset(
        {
            "solver": "sde",
            **_cns(
                GUIDED,
                s_churn=1.0,
                power_gamma=0.5,
                gamma_divider=25.0,
                alpha_tilt_start=-0.1,
                alpha_tilt_end=0.03,
                alpha_exp_interp=False,
                energy_scale=0.998,
                formula="authors",
            ),
        },
        "The authors' best run with guidance 1.5 (arXiv:2605.30332): SiT-XL/2 at ImageNet 256, 250 steps. "
        "Steps, guidance and schedule stay yours.",
    ),
    "twelve": Preset(
        {"num_inference_steps": 12, "solver": "sde_3m", "scheduler": "log_snr", "enable_cns": False},
        "Twelve steps instead of 28, as measured in docs/fewsteps.md.",
    ),
}


def preset(name: str) -> dict[str, Any]:
    """The values of a preset, to change and to hand on.

    ``pipeline("make it winter", ["cat.png"], **preset("twelve"))``

    Raises:
        ValueError: an unknown name; the message lists the presets.
    """
    if name not in PRESETS:
        allowed = ", ".join(repr(known) for known in PRESETS)
        raise ValueError(f"preset is {name!r}; allowed are {allowed}.")
    return dict(PRESETS[name].values)
