"""Local or remote: which branch of a workflow this machine takes, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

LOCAL, REMOTE = "local", "remote"
MODES = ("auto", "local", "fal")
HEADROOM = 1.2  # memory for activations, as a factor on the size of the largest file
GIB = 2**30


class Route(NamedTuple):
    """The branch taken, and the reason as it is shown."""

    branch: str
    why: str


def choose(mode: str, memory: int | None, sizes: Mapping[str, int], missing: Sequence[str]) -> Route:
    """The branch to take, and why.

    >>> choose("fal", None, {}, []).branch
    'remote'

    ComfyUI moves the text encoder out of the accelerator before it samples, and the transformer before it decodes where
    both do not fit, so the largest file decides.

    Args:
        mode: ``auto`` decides by the rest; ``local`` and ``fal`` are taken as they are.
        memory: counts the bytes of the accelerator; None where there is no accelerator.
        sizes: give the bytes of each file that the local branch puts on the accelerator, by name; empty where they are
            unknown.
        missing: name files that the local branch loads and that do not exist.
    """
    if mode != "auto":
        return Route(LOCAL if mode == "local" else REMOTE, f"{mode}: as chosen.")
    if memory is None:
        return Route(REMOTE, "fal: this machine has no accelerator.")
    if missing:
        return Route(REMOTE, f"fal: {', '.join(missing)} does not exist here.")
    if not sizes:
        why = "no Klein 9B Base Loader feeds local, or a link names its files, so what it needs is unknown."
        return Route(REMOTE, f"fal: {why}")
    largest = max(sizes, key=lambda name: sizes[name])
    needed = sizes[largest] * HEADROOM
    why = (
        f"its {memory / GIB:.1f} GiB are {{}} the largest part that must be there at once, {largest}: "
        f"{sizes[largest] / GIB:.1f} GiB x {HEADROOM} = {needed / GIB:.1f} GiB."
    )
    if needed > memory:
        return Route(REMOTE, f"fal: the accelerator is too small; {why.format('less than')}")
    return Route(LOCAL, f"local: the accelerator is large enough; {why.format('enough for')}")
