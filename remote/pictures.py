"""Pictures out (PNG) and in (bytes of a file, decoded within limits)."""

from __future__ import annotations

import base64
import hashlib
import io

from PIL import Image, UnidentifiedImageError

from .errors import RemoteError

MAX_PIXELS = 4096 * 4096
ENDINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}  # by the first bytes, before anything decodes


def encode_png(picture: Image.Image) -> bytes:
    """The picture as PNG: lossless, so fal edits the same pixels as the local nodes."""
    data = io.BytesIO()
    picture.convert("RGB").save(data, "PNG")
    return data.getvalue()


def pixel_digest(picture: Image.Image) -> str:
    """A hash of size and pixels, the same whatever encoder writes the file."""
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()


def data_uri(png: bytes) -> str:
    """A PNG inside an address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def inline_bytes(text: str) -> bytes:
    """The bytes of a ``data:`` URI, or of bare base64.

    Raises:
        RemoteError: it is neither.
    """
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError as error:  # binascii.Error is one
        raise RemoteError(f"is no base64 ({error})") from None


def ending(data: bytes) -> str:
    """What to call a file of these bytes; ``bin`` where they are no known picture."""
    return next((name for start, name in ENDINGS.items() if data.startswith(start)), "bin")


def decode(data: bytes) -> Image.Image:
    """RGB.

    Raises:
        RemoteError: no whole PNG, JPEG or WebP, or more than 4096 x 4096 pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise RemoteError(f"it is {picture.width}x{picture.height}, more than {MAX_PIXELS} pixels.")
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise RemoteError("it is no PNG, JPEG or WebP.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RemoteError(f"it cannot be decoded ({error}).") from None
