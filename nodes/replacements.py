"""Nodes of other packs that open as ours where their pack is absent; ``docs/migration.md`` says what differs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyAPI, io

from ..sampler.gamma_fits import UNGUIDED
from ..sampler.params import GAMMA_FILE, PREFIX

# CNSSampler_CHENGOU of IIs-fanta/ComfyUI-CNS-Sampler-CHENGOU: its widgets in the order in which a workflow keeps them.
CHENGOU = "CNSSampler_CHENGOU"
CHENGOU_WIDGETS = (
    "s_churn",
    "power_gamma",
    "gamma_divider",
    "energy_scale",
    "alpha_tilt_start",
    "alpha_tilt_end",
    "alpha_use_fnorm",
    "alpha_exp_interp",
    "alpha_exp_sharpness",
    "num_freq_bins",
    "use_bundled_gamma_matrix",
)
NOT_CARRIED = "use_bundled_gamma_matrix"  # a mapping can copy or set, and no widget of ours takes this one's value
CHENGOU_SETS = {
    "solver": "euler",
    "cns_gamma_source": "matrix",
    "cns_formula": "authors",
    GAMMA_FILE: UNGUIDED,  # a fit of the matrix that it brings
    "cns_seed": -1,
    "acceleration": "none",
}


def chengou() -> dict[str, Any]:
    """What `io.NodeReplace` takes for it: every number and switch copied, and set what it does without a widget."""
    copied = [{"new_id": PREFIX + name, "old_id": name} for name in CHENGOU_WIDGETS if name != NOT_CARRIED]
    return {
        "new_node_id": "CNSSampler",
        "old_node_id": CHENGOU,
        "old_widget_ids": list(CHENGOU_WIDGETS),
        "input_mapping": [*copied, *({"new_id": name, "set_value": value} for name, value in CHENGOU_SETS.items())],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    }


async def register_replacements() -> None:
    """Tell ComfyUI which nodes ours replace, where it can (0.14 and newer)."""
    if hasattr(io, "NodeReplace"):
        await ComfyAPI().node_replacement.register(io.NodeReplace(**chengou()))
