"""Pictures as references: read, shrunk to the megapixel limit, padded so that nothing shifts."""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from .sizes import STRIDE

MEGAPIXEL = 1024 * 1024
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def load_picture(source: str | Path | Image.Image) -> Image.Image:
    """A picture as upright RGB: EXIF rotation applied, transparency laid on white, 16-bit gray scaled to 8.

    >>> load_picture(Image.new("L", (8, 4))).mode
    'RGB'

    Args:
        source: a file, a ``data:`` URI, or a PIL image.

    Raises:
        ValueError: the file is missing, empty or unreadable, the source is a web address, or its pixel type is not a
            picture's.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "picture")
    if not isinstance(source, (str, Path)):
        raise ValueError(f"a picture is a {type(source).__name__}; give a file's path, a data: URI or a PIL image.")
    name = str(source)
    if name.startswith(("http://", "https://")):
        raise ValueError(f"picture {name} is a web address; download it and give the file, or a data: URI.")
    if name.startswith("data:"):
        name, data = "from the data: URI", _decode_data_uri(name)
    else:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"picture {name} does not exist; give the path of a PNG, JPEG or WebP file.")
        data = path.read_bytes()
    if not data:
        raise ValueError(f"picture {name} is empty; export or download it again.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _to_rgb(image, name)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):  # whose text names an object in memory
            reason = "its content is not a known picture format"
        raise ValueError(f"picture {name} cannot be read ({reason}); give a whole PNG, JPEG or WebP file.") from error


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as float32 [1, 3, H, W] in [0, 1].

    >>> to_pixels(Image.new("RGB", (8, 4), "white")).shape
    torch.Size([1, 3, 4, 8])
    """
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).permute(2, 0, 1)[None]


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as an 8-bit picture.

    >>> to_image(torch.ones(3, 4, 8)).size
    (8, 4)
    """
    array = pixels.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def prepare_reference(pixels: Tensor, megapixels: float) -> Tensor:
    """A picture as the VAE takes it: at most ``megapixels`` (of 1024 x 1024), sides multiples of 16.

    Shrinks, never grows, and keeps the aspect; then repeats the right and bottom edge, so that every pixel
    stays where it was.

    >>> prepare_reference(torch.zeros(1, 3, 2048, 2048), 1.0).shape
    torch.Size([1, 3, 1024, 1024])

    Args:
        pixels: [1, 3, H, W], holds the picture in [0, 1].
        megapixels: bounds height x width, in units of 1024 x 1024.
    """
    height, width = pixels.shape[-2:]
    fitted = fitted_size(width, height, megapixels)
    if fitted != (width, height):
        pixels = F.interpolate(pixels, fitted[::-1], mode="bicubic", antialias=True).clamp(0, 1)
    # channels last: the layout in which diffusers and ComfyUI hand pictures to the VAE, whose convolutions round by it
    return pad_edges(pixels).contiguous(memory_format=torch.channels_last)


def fitted_size(width: int, height: int, megapixels: float) -> tuple[int, int]:
    """(width, height) of a reference, shrunk to at most ``megapixels`` (of 1024 x 1024), before it is padded.

    >>> fitted_size(4096, 1024, 1.0)
    (2048, 512)
    """
    scale = math.sqrt(megapixels * MEGAPIXEL / (height * width))
    if scale < 1:
        width, height = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    return width, height


def pad_edges(pixels: Tensor) -> Tensor:
    """[B, C, H, W] with its right and bottom edge repeated, up to multiples of 16.

    >>> pad_edges(torch.zeros(1, 3, 20, 16)).shape
    torch.Size([1, 3, 32, 16])
    """
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


def _decode_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError("a data: URI must read data:image/png;base64,...; this one has no base64 part.")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data: URI holds no valid base64 ({error}); encode the picture again.") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if min(image.size) == 0:
        raise ValueError(f"picture {name} is {image.width}x{image.height}, without any pixel; give another.")
    if image.mode in DEEP:
        gray = np.asarray(image, dtype=np.float64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"picture {name} holds values beyond 16 bits; save it as 8- or 16-bit PNG.")
        if image.mode != "I" or gray.max() > 255:
            gray = gray / 257.0
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(f"picture {name} holds floating-point values of unknown range; save it as 8- or 16-bit PNG.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
