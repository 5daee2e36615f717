"""What a run made, and writing it to files."""

from __future__ import annotations

import json
import tempfile
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
    """What a run made, and from what."""

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
        """Write each picture (``name-1``, ``name-2`` ... where there are several); a PNG carries the parameters.

        Raises:
            ValueError: a format other than png, jpeg and webp.
        """
        if output_format not in FORMATS:
            raise ValueError(f"output_format is {output_format!r}; allowed are {', '.join(FORMATS)}.")
        path = check_output(path)
        paths = [path] if len(self.pixels) == 1 else [
            path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(len(self.pixels))
        ]
        info = PngInfo()
        info.add_itxt(PARAMETERS_KEY, json.dumps(self.parameters, ensure_ascii=False))
        options = {"png": {"pnginfo": info}, "jpeg": {"quality": 95}, "webp": {"quality": 95}}[output_format]
        for image, file in zip(self.images, paths, strict=True):
            partial = file.with_name(f"{file.name}.part")  # so that an interrupt keeps the file that was there
            image.save(partial, FORMATS[output_format], **options)
            partial.replace(file)
        return paths


def check_output(path: str | Path) -> Path:
    """The path of a file to write, its folder made.

    Raises:
        ValueError: a folder, or a place that cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; give the name of a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"output {path} cannot be written ({error.strerror}); choose another place.") from error
    return path
