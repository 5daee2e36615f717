"""From a response to pictures: first files in the output folder, then decoded."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .download import Gone, Interrupted, fetch
from .errors import RUN_AGAIN, RemoteError, Unobtainable
from .journal import COMPLETED, SAVED, Row
from .limits import LOOKS
from .order import Order
from .pictures import decode, ending, inline_bytes
from .response import SAVED_AS, ImageFile, Response, parse_response
from .session import Session


class Spoiled(RemoteError):
    """A saved file is no picture.

    Args:
        index: which.
    """

    def __init__(self, text: str, index: int) -> None:
        super().__init__(text)
        self.index = index


@dataclass(frozen=True)
class Collected:
    """What a run brought.

    Args:
        images: RGB; their sizes may differ.
        seed: fal's, else the one asked for; None where neither is known.
        cost_usd: what this run submitted costs; 0 where it collected an earlier request.
        response: fal's whole response as JSON; a picture inside it is replaced by the name of its file.
        files: the pictures as fal sent them.
        warnings: what is odd about it.
    """

    images: list[Image.Image]
    seed: int | None
    request_id: str
    cost_usd: float
    response: str
    files: list[Path]
    warnings: list[str]


async def save(session: Session, row: Row) -> Row:
    """Write every picture of a COMPLETED request to the results folder, as it came; the row as SAVED.

    What does not come is looked for again, a file that is said to be gone for minutes.

    Raises:
        Unobtainable: pictures are gone, and nothing else is wrong.
        RemoteError: a picture could not be fetched or written this time. The others are files all the same.
    """
    waits, began, tried, cut_off = session.waits, time.monotonic(), 0, 0
    while True:
        row, faults = await _save_missing(session, row)
        if not faults:
            return session.journal.update(row, SAVED, response=_without_inline(row.response, row.files))
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


async def _save_missing(session: Session, row: Row) -> tuple[Row, list[RemoteError]]:
    """Try once to fetch each picture that is no file yet; the row, and what went wrong."""
    response, _ = parse_response(json.loads(row.response))
    files = list(row.files or [""] * len(response.images))
    faults = []
    for index, image in enumerate(response.images):
        if image is None or (files[index] and (session.results / files[index]).is_file()):
            continue
        session.progress(f"fetching picture {index + 1} of {len(files)}")
        files[index] = ""
        try:
            files[index] = _write(session.results, row.request_id, index, await _bytes(session, image))
        except RemoteError as error:
            faults.append(error)
        else:
            row = session.journal.update(row, COMPLETED, files=files)
    return row, faults


async def _bytes(session: Session, image: ImageFile) -> bytes:
    if image.inline is not None:
        return inline_bytes(image.inline)
    address = image.url or image.content or ""
    if address.startswith(SAVED_AS):
        name = address.removeprefix(SAVED_AS)
        raise Unobtainable(f"the picture came inside fal's answer, and its file {name} is gone or spoiled.")
    return await fetch(address, session.api.base, session.api.certificates, session.waits)


def _write(folder: Path, request_id: str, index: int, data: bytes) -> str:
    """Write the bytes as they came; the file's name.

    Raises:
        RemoteError: the folder cannot be written to.
    """
    path = folder / f"{request_id}_{index}.{ending(data)}"
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


def _without_inline(response: str, files: Sequence[str]) -> str:
    """The response's JSON with the name of its file in place of each picture that was inside it."""
    data = json.loads(response)
    for image, name in zip(data["images"], files, strict=True):
        if not name:
            continue
        if str(image.get("url") or "").startswith("data:"):
            image["url"] = SAVED_AS + name
        if image.get("content"):
            image["content"] = SAVED_AS + name
    return json.dumps(data)


def collect(row: Row, folder: Path, order: Order | None, cost_usd: float, refuse_flagged: bool) -> Collected | None:
    """The pictures of a saved request; None where a file is gone.

    Raises:
        Spoiled: a file is no picture.
        RemoteError: the safety checker flagged a picture, and that is to be an error.
    """
    response, warnings = parse_response(json.loads(row.response))
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
        data = file.read_bytes()
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
    return Collected(images, seed, row.request_id, cost_usd, row.response, files, warnings)


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
        found += [f"a picture is {image.width}x{image.height}, asked for was {asked[0]}x{asked[1]}"
                  for image in images if image.size != asked]
    return found
