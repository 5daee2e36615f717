"""From fal's response to pictures: parsed leniently, saved as files as they came, and only then decoded."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError

from .errors import RUN_AGAIN, Gone, Interrupted, NoPictures, RemoteError, Spoiled, Unobtainable
from .journal import COMPLETED, SAVED, Entry
from .limits import LOOKS
from .order import Order
from .transfer import Session, fetch

MAX_PIXELS = 4096 * 4096
ENDINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}  # by the first bytes, before anything decodes
SAVED_AS = "saved as "  # stands in the kept response where a picture was inside it
Model = TypeVar("Model", bound=BaseModel)


class ImageFile(BaseModel):
    """One picture: a file at ``url`` (perhaps a data URI), or inline ``content``."""

    model_config = ConfigDict(extra="allow")

    url: str | None = None
    content: str | None = None
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None
    width: int | None = None
    height: int | None = None

    @property
    def inline(self) -> str | None:
        """The text that holds the picture itself; None where it has an address."""
        if self.content and not self.content.startswith(SAVED_AS):
            return self.content
        return self.url if self.url and self.url.startswith("data:") else None


class Response(BaseModel):
    """The response of fal. Unknown fields are kept. ``images`` holds None where an entry is not a picture."""

    model_config = ConfigDict(extra="allow")

    images: list[ImageFile | None]
    timings: dict[str, Any] | None = None
    seed: int | None = None
    has_nsfw_concepts: list[bool | None] | StrictBool | None = None
    prompt: str | None = None


def parse_response(data: Any) -> tuple[Response, list[str]]:
    """The response, and a warning for each picture and field that is missing or unusable; these are left aside.

    >>> parse_response({"images": [{"url": "https://example.com/a.png"}], "seed": 5})[0].seed
    5

    Raises:
        NoPictures: the data hold no picture.
    """
    entries = data.get("images") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise NoPictures("fal's response holds no list of pictures.")
    images: list[ImageFile | None] = []
    faults, warnings = [], []
    for number, entry in enumerate(entries, start=1):
        try:
            image, spoiled = _image(entry)
            warnings += spoiled
        except RemoteError as error:
            image = None
            faults.append(f"picture {number} of fal's response {error}")
        images.append(image)
    if not any(images):
        raise NoPictures(f"fal's response holds no picture{''.join(f'; {fault}' for fault in faults)}.")
    response, spoiled = _lenient(Response, {**data, "images": images})
    warnings += spoiled
    missing = [name for name in ("timings", "seed", "has_nsfw_concepts", "prompt") if getattr(response, name) is None]
    dropped = {warning.split()[0] for warning in spoiled}
    missing = [f"{name} is missing in fal's response" for name in missing if name not in dropped]
    return response, [*faults, *warnings, *missing]


@dataclass(frozen=True)
class Collected:
    """The result of a run.

    Args:
        images: hold RGB pictures; their sizes may differ.
        seed: is fal's, else the requested one; None where neither is known.
        request_id: is fal's name for the request.
        cost_usd: counts what this run submitted; 0 where it collected an earlier request.
        response: holds fal's whole response as JSON; a picture inside it is replaced by the name of its file.
        files: hold the pictures as fal sent them.
        warnings: say what is odd about the result.
    """

    images: list[Image.Image]
    seed: int | None
    request_id: str
    cost_usd: float
    response: str
    files: list[Path]
    warnings: list[str]


async def save(session: Session, row: Entry) -> Entry:
    """Write every picture of a COMPLETED request to the results folder, as it came.

    A picture that does not come is fetched again; a file that its server calls gone is looked for over minutes.

    Args:
        session: holds the queue, the journal and the folder.
        row: holds fal's response.

    Returns:
        the row as SAVED.

    Raises:
        Unobtainable: pictures are gone, and nothing else is wrong.
        RemoteError: a picture could not be fetched or written this time. The others are saved.
    """
    waits, began, tried, cut_off = session.waits, time.monotonic(), 0, 0
    while True:
        row, faults = await _save_missing(session, row)
        if not faults:
            return session.journal.update(row, SAVED, response=_without_inline(row))
        tried += 1
        waiting = time.monotonic() - began < waits.gone or tried < LOOKS
        gone = any(isinstance(fault, Gone) for fault in faults)
        cut = any(isinstance(fault, Interrupted) for fault in faults)
        if cut:
            cut_off += 1
        if not ((gone and waiting) or (cut and cut_off < waits.tries)):
            break
        session.progress(f"{faults[0]} Asking again.")
        await asyncio.sleep(min(waits.backoff * 2 ** (tried - 1), waits.longest_backoff))
    others = ", ".join(name for name in row.files if name and (session.results / name).is_file())
    text = f"{faults[0]} Saved in {session.results}: {others}." if others else str(faults[0])
    if all(isinstance(fault, (Gone, Unobtainable)) for fault in faults):
        raise Unobtainable(text)
    raise RemoteError(f"{text} {RUN_AGAIN}")


async def _save_missing(session: Session, row: Entry) -> tuple[Entry, list[RemoteError]]:
    """Try once to fetch each picture that is no file yet; the row, and what went wrong."""
    response, _ = parse_response(row.answer)
    files = list(row.files or [""] * len(response.images))
    faults = []
    for index, image in enumerate(response.images):
        if image is None or (files[index] and (session.results / files[index]).is_file()):
            continue
        session.progress(f"fetching picture {index + 1} of {len(files)}")
        files[index] = ""
        try:
            files[index] = _write(session.results, row.known_id, index, await _bytes(session, image))
        except RemoteError as error:
            faults.append(error)
        else:
            row = session.journal.update(row, COMPLETED, files=files)
    return row, faults


def collect(
    row: Entry, *, folder: Path, order: Order | None, cost_usd: float, refuse_flagged: bool
) -> Collected | None:
    """The pictures of a saved request; None where a file is gone.

    Args:
        row: names the files.
        folder: holds them.
        order: holds the inputs; None where they are not known.
        cost_usd: counts what this run submitted.
        refuse_flagged: whether a picture that the safety checker flagged is an error.

    Raises:
        Spoiled: a file is not a picture.
        RemoteError: the safety checker flagged a picture, and ``refuse_flagged`` is set.
    """
    response, warnings = parse_response(row.answer)
    found = [
        (index, image, folder / name)
        for index, (image, name) in enumerate(zip(response.images, row.files, strict=True))
        if image is not None
    ]
    files = [file for *_, file in found]
    if not all(file.is_file() for file in files):
        return None
    if refuse_flagged:
        _check_flags(response, folder)
    images = []
    for index, image, file in found:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise RemoteError(f"{file} cannot be read ({error.strerror}). Let this user read it.") from None
        try:
            images.append(decode(data))
        except RemoteError as error:
            text = f"picture {index + 1} of request {row.request_id} is saved as {file}, but {error}"
            raise Spoiled(text, index) from None
        warnings += _differences(index, image, len(data), images[-1])
    seed = response.seed
    if order is not None:
        seed = order.arguments.get("seed") if seed is None else seed
        warnings += _unlike(order, images)
    return Collected(
        images=images,
        seed=seed,
        request_id=row.known_id,
        cost_usd=cost_usd,
        response=json.dumps(row.answer),
        files=files,
        warnings=warnings,
    )


def decode(data: bytes) -> Image.Image:
    """The bytes of a PNG, JPEG or WebP as an RGB picture.

    Raises:
        RemoteError: the bytes are not a whole picture in one of these formats, or it has more than 4096 x 4096 pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise RemoteError(f"it is {picture.width}x{picture.height}, more than {MAX_PIXELS} pixels.")
            found: Image.Image = picture.convert("RGB")
            return found
    except UnidentifiedImageError:
        raise RemoteError("it is not a PNG, JPEG or WebP.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RemoteError(f"it cannot be decoded ({error}).") from None


def _image(entry: Any) -> tuple[ImageFile, list[str]]:
    """Raises RemoteError with what is wrong with an entry that is no picture."""
    if not isinstance(entry, dict):
        raise RemoteError(f"is {'null' if entry is None else type(entry).__name__}")
    image, warnings = _lenient(ImageFile, entry)
    if image.inline is not None:
        _inline_bytes(image.inline)
    elif not (image.url or image.content):
        raise RemoteError("names no address")
    return image, warnings


def _lenient(model: type[Model], data: dict[str, Any]) -> tuple[Model, list[str]]:
    """The model of the fields that fit, and a warning for each that does not."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        spoiled = sorted({str(fault["loc"][0]) for fault in error.errors()})
        kept = {name: value for name, value in data.items() if name not in spoiled}
        return model.model_validate(kept), [f"{name} in fal's response is unusable" for name in spoiled]


def _inline_bytes(text: str) -> bytes:
    """The bytes of a ``data:`` URI, or of bare base64.

    Raises:
        RemoteError: it is neither.
    """
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError as error:  # binascii.Error is one
        raise RemoteError(f"is not base64 ({error})") from None


def _ending(data: bytes) -> str:
    """The ending of a file of these bytes; ``bin`` where they are not a known picture."""
    return next((name for start, name in ENDINGS.items() if data.startswith(start)), "bin")


async def _bytes(session: Session, image: ImageFile) -> bytes:
    if image.inline is not None:
        return _inline_bytes(image.inline)
    address = image.url or image.content or ""
    if address.startswith(SAVED_AS):
        name = address.removeprefix(SAVED_AS)
        raise Unobtainable(f"the picture came inside fal's answer, and its file {name} is gone or spoiled.")
    queue = session.queue
    return await fetch(address, trusted=queue.base, certificates=queue.certificates, waits=session.waits)


def _write(folder: Path, request_id: str, index: int, data: bytes) -> str:
    """Write the bytes as they came; the file's name.

    Raises:
        RemoteError: the folder cannot be written to.
    """
    path = folder / f"{request_id}_{index}.{_ending(data)}"
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise RemoteError(f"{path} cannot be written ({error.strerror}).") from None
    return path.name


def _without_inline(row: Entry) -> str:
    """The response's JSON with the name of its file in place of each picture that was inside it."""
    data = row.answer
    for image, name in zip(data["images"], row.files, strict=True):
        if not name:
            continue
        if str(image.get("url") or "").startswith("data:"):
            image["url"] = SAVED_AS + name
        if image.get("content"):
            image["content"] = SAVED_AS + name
    return json.dumps(data)


def _check_flags(response: Response, folder: Path) -> None:
    flags, count = response.has_nsfw_concepts, len(response.images)
    if isinstance(flags, bool):
        flags = [flags] * count
    flagged = [str(i + 1) for i, flag in enumerate(flags or []) if flag]
    if flagged:
        raise RemoteError(
            f"fal's safety checker flagged picture {', '.join(flagged)} of {count}; such pictures come black. The "
            f"files are in {folder}. Change the prompt or the pictures, or set on_flagged to pass to go on "
            "with what came."
        )


def _differences(index: int, image: ImageFile, size: int, picture: Image.Image) -> list[str]:
    found = []
    said = (image.width, image.height)
    if None not in said and said != picture.size:
        found.append(f"picture {index + 1} is {picture.width}x{picture.height}, fal said {said[0]}x{said[1]}")
    if image.file_size and image.file_size != size:
        found.append(f"the file of picture {index + 1} has {size} bytes, fal said {image.file_size}")
    return found


def _unlike(order: Order, images: list[Image.Image]) -> list[str]:
    """How the pictures differ from what was asked for."""
    found = []
    wanted = order.arguments["num_images"]
    if len(images) != wanted:
        found.append(f"{len(images)} pictures came, {wanted} were asked for")
    asked = order.size
    if asked is not None:
        found += [
            f"a picture is {image.width}x{image.height}, asked for was {asked[0]}x{asked[1]}"
            for image in images
            if image.size != asked
        ]
    return found
