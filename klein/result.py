"""What a run made, and writing it to files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .references import to_image

PARAMETERS_KEY = "klein_cns"  # of the PNG text chunk
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class KleinResult:
    """What a run made, and from what: ``pipe("a red coat").images[0].show()``."""

    pixels: Tensor  # float32 [B, 3, H, W] in [0, 1], on the CPU
    latents: Tensor  # float32 [B, 128, h, w], normalised as ComfyUI's LATENT, on the CPU
    seed: int
    timings: dict[str, float]  # seconds of each stage
    parameters: dict[str, Any]  # every field of the request under its public name, and what it ran on

    @property
    def images(self) -> list[Image.Image]:
        """8-bit pictures."""
        return [to_image(pixels) for pixels in self.pixels]

    def save(self, path: str | Path, output_format: str = "png") -> list[Path]:
        """Write each picture (``name-1``, ``name-2`` ... where there are several); a PNG carries the parameters::

            files = result.save("edited.png")

        Args:
            path: names the file, or for several pictures the files before their numbers.
            output_format: ``png``, ``jpeg`` or ``webp``; the ending of the name changes nothing.

        Returns:
            the files, in the order of the pictures.

        Raises:
            ValueError: the format is not allowed, or a file cannot be written.
        """
        paths = output_files(path, len(self.pixels), output_format)
        info = PngInfo()
        info.add_itxt(PARAMETERS_KEY, json.dumps(self.parameters))  # ASCII, since a file's name may not be Unicode
        options: dict[str, Any] = {"pnginfo": info} if output_format == "png" else {"quality": 95}
        for image, file in zip(self.images, paths, strict=True):
            image.save(_partial(file), FORMATS[output_format], **options)
            _partial(file).replace(file)
        return paths


def output_files(path: str | Path, count: int, output_format: str = "png") -> list[Path]:
    """The files for ``count`` pictures, each tried out: ``name``, or where there are several ``name-1``, ``name-2`` ...

    After this only a full disk can make writing them fail; their folder is made.

    Args:
        path: names the file, or for several pictures the files before their numbers.
        count: counts the pictures, from 1.
        output_format: ``png``, ``jpeg`` or ``webp``.

    Raises:
        ValueError: the format is unknown or Pillow lacks it, or a name is a folder's or cannot be written.
    """
    if output_format not in FORMATS:
        raise ValueError(f"output_format is {output_format!r}; allowed are {', '.join(FORMATS)}.")
    Image.init()
    if FORMATS[output_format] not in Image.SAVE:
        raise ValueError(f"output_format is {output_format}, which this Pillow was built without; choose png.")
    path = Path(path)
    files = [path]
    if count > 1 and path.name:
        files = [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]
    for file in files:
        _try_out(file)
    return files


def _try_out(file: Path) -> None:
    try:
        if file.is_dir():
            raise ValueError(f"output {file} is a folder; give the name of a file in it.")
        file.parent.mkdir(parents=True, exist_ok=True)
        _partial(file).open("wb").close()
        _partial(file).unlink()
        protected = file.exists() and not os.access(file, os.W_OK)
    except OSError as error:
        raise ValueError(f"output {file} cannot be written ({error.strerror}); choose another place.") from error
    if protected:
        raise ValueError(f"output {file} is protected against writing; choose another name, or unprotect it.")


def _partial(file: Path) -> Path:
    """The file that is written first, so that an interrupt keeps the old one."""
    return file.with_name(f"{file.name}.part")
