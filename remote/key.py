"""The key: from ``FAL_KEY``, else from a file of its own. Read anew for each run, and never shown."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from .errors import RemoteError

VARIABLE = "FAL_KEY"
FILE = "fal_key"


def read_key(environment: Mapping[str, str], file: Path) -> str:
    """The key of the environment, else of ``file``.

    Raises:
        RemoteError: there is none, the file can be read by others, or what it holds cannot be a key. The text never
            holds the key.
    """
    key, source = environment.get(VARIABLE, "").strip(), f"the environment variable {VARIABLE}"
    if not key:
        key, source = _from_file(file), str(file)
    if not key:
        raise RemoteError(
            f"there is no fal key. Make one at fal.ai/dashboard/keys and set the environment variable {VARIABLE}, or "
            f"write it into {file} (mode 600)."
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise RemoteError(f"{source} holds no fal key: a line of letters, digits, '-' and ':'. Copy it anew.")
    return key


def _from_file(file: Path) -> str:
    try:
        if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise RemoteError(f"other users can read {file}. Run: chmod 600 '{file}'")
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RemoteError(f"{file} cannot be read ({type(error).__name__}); write the fal key into it again.") from None
