"""What several nodes share."""

from __future__ import annotations

from pathlib import PureWindowsPath


def is_inside(name: str) -> bool:
    """Whether a file's name stays below the folder that it is looked up in, on every system.

    Windows' rules are the stricter ones: both slashes separate, and a drive anywhere leaves the folder.
    """
    path = PureWindowsPath(name)
    parts = (path, *(PureWindowsPath(part) for part in path.parts))
    return bool(path.parts) and "\0" not in name and ".." not in path.parts and not any(part.anchor for part in parts)
