"""FLUX.2 [klein] 9B Base, local and exact: Colored Noise Sampling, multi-image edits, LoRAs.

Imports without ComfyUI and without diffusers; both are loaded where they are used.
"""

from __future__ import annotations

import logging
import re
from importlib import metadata
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The pack's nodes, for ComfyUI."""
    try:
        from .nodes import KleinExtension
    except Exception:  # ComfyUI would log one line without a traceback
        logging.exception("klein-cns: the nodes could not be imported")
        raise
    return KleinExtension()


def _version() -> str:
    """The version that pyproject.toml states: in a clone the file's own, elsewhere what was installed from it."""
    project = Path(__file__).with_name("pyproject.toml")
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    stated = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return stated.group(1) if stated else metadata.version("klein-cns")


__version__ = _version()
__all__ = ["WEB_DIRECTORY", "__version__", "comfy_entrypoint"]
