"""The CNS widgets, made from `CNSParams`: one list for every node that has them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..sampler.gamma_fits import FITS
from ..sampler.params import GAMMA_FILE, LOCAL_NAMES, SWITCH, CNSParams, public_name
from ..sampler.progress import ProgressMatrix, shipped_progress
from ..sampler.solvers import DEFAULT_SOLVER, SOLVER_HELP, SOLVERS
from .common import FLUX2_CHANNELS, is_inside

GAMMA_FOLDER = "cns_gamma"
GAMMA_ENDINGS = {".safetensors", ".pt"}


def add_gamma_folder() -> None:
    """Make ``models/cns_gamma`` known to ComfyUI, for the files that can hold a matrix."""
    folder_paths.add_model_folder_path(GAMMA_FOLDER, str(Path(folder_paths.models_dir) / GAMMA_FOLDER))
    folder_paths.folder_names_and_paths[GAMMA_FOLDER][1].update(GAMMA_ENDINGS)


def cns_inputs(switch: bool = True, churn: bool = True) -> list[io.Input]:
    """enable_cns and every ``cns_*`` of the endpoint in its order, then the local ones as advanced widgets.

    Args:
        switch: whether ``enable_cns`` is among them; a node that is nothing without CNS has none.
        churn: whether ``cns_s_churn`` is; a node that does not decide how much noise is added has none.
    """
    left_out = {name for name, kept in ((SWITCH, switch), ("s_churn", churn)) if not kept}
    named = [spec for spec in fields(CNSParams) if spec.name not in left_out]
    endpoint = [spec for spec in named if public_name(spec.name) not in LOCAL_NAMES]
    local = [spec for spec in named if public_name(spec.name) in LOCAL_NAMES]
    common = [widget(public_name(spec.name), spec) for spec in endpoint]
    return [*common, *(widget(public_name(spec.name), spec, advanced=True) for spec in local), _gamma_file()]


def load_progress(params: CNSParams, gamma_file: str) -> ProgressMatrix | None:
    """The matrix that ``cns_gamma_file`` names; None where γ does not come from a matrix.

    Raises:
        ValueError: a file that is neither shipped nor in ``models/cns_gamma``.
    """
    if not params.takes_matrix:
        return None
    if gamma_file in FITS:
        return shipped_progress(gamma_file)
    path = folder_paths.get_full_path(GAMMA_FOLDER, gamma_file) if is_inside(gamma_file) else None
    if path is None:
        raise ValueError(
            f"{GAMMA_FILE} {gamma_file!r} does not exist; put it into models/{GAMMA_FOLDER}/, or choose one of "
            f"{', '.join(gamma_files())}."
        )
    return ProgressMatrix.load(path)


def gamma_stamp(gamma_file: str | None) -> Any:
    """What changes when a measured matrix does, so that the node runs again.

    Args:
        gamma_file: the widget's value; None where it is linked, so that any file of the folder may be meant.
    """
    names = folder_paths.get_filename_list(GAMMA_FOLDER) if gamma_file is None else [gamma_file]
    own = [name for name in names if name not in FITS and is_inside(name)]
    paths = [folder_paths.get_full_path(GAMMA_FOLDER, name) for name in own]
    return [Path(path).stat().st_mtime_ns for path in paths if path]


def gamma_files() -> list[str]:
    """The shipped matrices, then the files of ``models/cns_gamma``."""
    return [*FITS, *folder_paths.get_filename_list(GAMMA_FOLDER)]


def patch_size(model: Any) -> int:
    """2 where the model's latents are FLUX.2's 2x2 patches, else 1."""
    latent_format = model.get_model_object("latent_format")
    packed = (latent_format.latent_channels, getattr(latent_format, "spacial_downscale_ratio", None))
    return 2 if packed == (FLUX2_CHANNELS, 16) else 1


def downscale_ratio(model: Any) -> int:
    """Pixels of the picture in the side of a latent's position; 8 where ComfyUI does not say."""
    return getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)


def solver_input() -> io.Input:
    """The widget that chooses a solver."""
    return io.Combo.Input("solver", options=list(SOLVERS), default=DEFAULT_SOLVER, tooltip=SOLVER_HELP)


def widget(name: str, spec: Any, advanced: bool | None = None) -> io.Input:
    """A combo, boolean, integer or float widget from a `choice`, `flag` or `number` field."""
    meta = spec.metadata
    common = {"tooltip": meta["help"], "advanced": advanced}
    if "options" in meta:
        return io.Combo.Input(name, options=list(meta["options"]), default=spec.default, **common)
    if "min" not in meta:
        default = False if spec.name == SWITCH else spec.default
        return io.Boolean.Input(name, default=default, **common)
    kind = io.Int if isinstance(spec.default, int) else io.Float
    return kind.Input(name, default=spec.default, min=meta["min"], max=meta["max"], step=meta["step"], **common)


def _gamma_file() -> io.Input:
    files = gamma_files()
    return io.Combo.Input(
        GAMMA_FILE,
        options=files,
        default=files[0],
        advanced=True,
        tooltip=f"Which gamma 'matrix' takes: a shipped fit, or a file of models/{GAMMA_FOLDER}/.",
    )
