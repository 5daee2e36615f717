"""What several nodes share."""

from __future__ import annotations

from pathlib import PureWindowsPath

CATEGORY = "klein"  # of every node; the browser's modules know it too
FLUX2_CHANNELS = 128  # of a packed latent
SIZE_KEY = "klein_size"  # (width, height) in a LATENT, for the decoder


def is_inside(name: str) -> bool:
    """Whether a file's name stays below the folder that it is looked up in, on every system.

    Windows' rules are the stricter ones: both slashes separate, and a drive anywhere leaves the folder.
    """
    path = PureWindowsPath(name)
    parts = (path, *(PureWindowsPath(part) for part in path.parts))
    return bool(path.parts) and "\0" not in name and ".." not in path.parts and not any(part.anchor for part in parts)
