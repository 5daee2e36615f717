"""How long to wait, how much to read, and how deep JSON may be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from .errors import NoAnswer, TooLarge

MAX_ANSWER = 256 * 2**20  # bytes; four inline PNGs of 2048 x 2048 are below 100 MiB
MAX_FILE = 64 * 2**20  # bytes; a PNG of 2048 x 2048 in 8 bits is below 13 MiB
LOOKS = 5  # fal must say so often that it does not know something, or the key: just after a submission it may not yet
FAILED_LOOKS = 3  # so often that a completed request has failed, where only its result says so
MAX_DEPTH = 64  # levels of JSON; fal's answers have about five
# Decoders whose output is at most about a thousand times their input. A second one on top would square that.
ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Waits:
    """Seconds, and how often to try."""

    poll: float = 1.0  # between two looks at a request
    connect: float = 15.0
    answer: float = 60.0  # for one answer of the API, and between two pieces of a file
    submit: float = 120.0  # for the answer to the submission
    transfer: float = 600.0  # for one whole result or file, as long as bytes come
    grace: float = 20.0  # after an interrupt: for an answer under way, then for fal to confirm the cancellation
    queue: float = 1800.0  # in fal's queue
    running: float = 900.0  # on fal's machine
    silence: float = 600.0  # without one usable answer
    gone: float = 180.0  # of nothing but "it is gone" before that is believed
    tries: int = 5  # for what certainly was not taken, and for a file
    backoff: float = 1.0  # before the second try; doubles
    longest_backoff: float = 15.0
    retry_after: float = 60.0  # the longest Retry-After that is waited for


async def within(seconds: float, work: Awaitable[Result]) -> Result:
    """The result of ``work``, if it comes in time: ``await within(5.0, fetch(url))``.

    Never swallows a cancellation, as ``wait_for`` did before Python 3.12.

    Raises:
        asyncio.TimeoutError: the work took longer; it is cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if task.cancel():  # False where it has ended
            await asyncio.wait({task})
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


async def read(response: httpx.Response, limit: int, what: str) -> bytes:
    """The body of a streamed response, decompressed.

    Args:
        response: is open and not read yet.
        limit: bounds the bytes, before they are decompressed and after.
        what: names the response in an error.

    Raises:
        TooLarge: there are more bytes.
        NoAnswer: the body is compressed in a way that could expand to any size.
    """
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ENCODINGS:
        raise NoAnswer(f"{what} is encoded as {encoding[:40]!r}, which was not asked for.")
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if max(len(data), response.num_bytes_downloaded) > limit:
            raise TooLarge(f"{what} is larger than {limit // 2**20} MiB; it was not read.")
    return bytes(data)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text; None where the text is not JSON, or is nested deeper than `MAX_DEPTH`.

    >>> parse_json(b'{"a": [1]}')
    {'a': [1]}
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for one in level for part in _parts(one)]
        if not level:
            return value
    return None


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
