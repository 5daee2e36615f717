"""The pictures of the templates, put where ComfyUI's Load Image finds them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "example_workflows" / "pictures"
ENDINGS = (".jpg", ".png")


def add_example_pictures(folder: Path) -> None:
    """Copy the templates' pictures into a folder; a file or link of the same name there stays as it is.

    They lie at the top of ComfyUI's ``input`` folder, because Load Image lists only what is there, and the frontend
    takes any other name for missing. A folder that cannot be written is a warning: the nodes work without the pictures.
    """
    for picture in sorted(path for path in SOURCE.glob("klein_cns_*") if path.suffix in ENDINGS):
        target = folder / picture.name
        if os.path.lexists(target):
            continue
        partial = target.with_suffix(".part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, partial)  # whole or not at all: a part of a picture would never be replaced
            partial.replace(target)
        except OSError as error:
            logging.warning("klein-cns: the templates' picture %s could not be copied: %s", picture.name, error)
