"""Which model a LoRA was made for, told from its modules and their shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache

from ..weights.architecture import ARCHITECTURES, FLUX_1_WIDTHS, TINY, Architecture
from .names import FLUX_1, Place

UNKNOWN = "unknown"
FLUX_1_NAME = "FLUX.1"
FLUX_1_BLOCKS = (19, 38)  # double, single
FLUX_1_SIZES = {  # (rows, columns) in hidden widths
    "_attn.qkv.": (3, 1), "_attn.proj.": (1, 1), "_mlp.0.": (4, 1), "_mlp.2.": (1, 4), ".linear1.": (7, 1),
    ".linear2.": (1, 5),
}  # fmt: skip
Shaped = tuple[Place, tuple[int, ...]]


@lru_cache(8)
def shapes_of(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """`Architecture.shapes`, made once."""
    return architecture.shapes()


def expected_shape(architecture: Architecture, place: Place) -> tuple[int, ...] | None:
    """The shape of the change of a module; None where the architecture has no such weight."""
    shape = shapes_of(architecture).get(place.weight)
    return shape and (shape[0] // place.parts, *shape[1:])


def base_of(target: Architecture, modules: Collection[Shaped], unknown: Iterable[str]) -> str:
    """The base model in words: the target's name, another's, or ``unknown``.

    Args:
        modules: each module found, with the shape of its change.
        unknown: modules that FLUX.2 does not have.
    """
    if any(FLUX_1.search(module) for module in unknown):
        return FLUX_1_NAME
    if not modules:
        return UNKNOWN
    candidates = dict.fromkeys((target, *ARCHITECTURES, TINY))
    fitting = [one for one in candidates if all(expected_shape(one, place) == shape for place, shape in modules)]
    if target in fitting:
        return target.name
    names = [one.name for one in fitting]
    if all(_fits_flux_1(place, shape) for place, shape in modules):
        names.append(FLUX_1_NAME)
    return " or ".join(names) or UNKNOWN


def _fits_flux_1(place: Place, shape: tuple[int, ...]) -> bool:
    """Whether FLUX.1 has this module in this shape: as wide as klein 4B, with another MLP and more blocks."""
    out, into = next((sizes for part, sizes in FLUX_1_SIZES.items() if part in place.weight), (0, 0))
    block = int(place.weight.split(".")[1]) if out else 0
    blocks = FLUX_1_BLOCKS[place.weight.startswith("single_blocks.")]
    return shape == (out * FLUX_1_WIDTHS[0] // place.parts, into * FLUX_1_WIDTHS[0]) and block < blocks
