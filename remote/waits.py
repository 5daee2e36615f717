"""How long a run waits, and for what."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import RUN_AGAIN, RemoteError, Unobtainable


@dataclass(frozen=True)
class Waits:
    """Seconds, and how often to try."""

    poll: float = 1.0  # between two looks at a request
    connect: float = 15.0
    answer: float = 60.0  # for one answer of the API, and between two pieces of a file
    submit: float = 120.0  # for the answer to the submission
    grace: float = 20.0  # after an interrupt: for an answer under way, then for fal to confirm the cancellation
    queue: float = 1800.0  # in fal's queue
    running: float = 900.0  # on fal's machine
    silence: float = 600.0  # without one usable answer
    tries: int = 5  # for what certainly was not taken, and for a file
    backoff: float = 1.0  # before the second try; doubles
    retry_after: float = 60.0  # the longest Retry-After that is waited for


class Watch:
    """Shows how a request is getting on, and says when it has taken too long. Nothing is cancelled for that."""

    def __init__(self, request_id: str, waits: Waits, progress: Callable[[str], None]) -> None:
        self._id, self._waits, self._progress = request_id, waits, progress
        self._began = self._heard = time.monotonic()
        self._running: float | None = None

    def look(self, status: Any) -> None:
        """Take in a status of fal-client's; None, or ``Completed`` without a result to be had, counts as silence.

        Raises:
            RemoteError: too long in the queue, on the machine, or without a usable answer.
            Unobtainable: completed for too long without giving the result.
        """
        now, kind = time.monotonic(), type(status).__name__
        if kind == "Queued":
            self._heard = now
            self._over(now - self._began, self._waits.queue, "still waits in fal's queue", "it stays there")
            place = "" if status.position is None else f", position {status.position}"
            self._progress(f"in fal's queue{place}, {now - self._began:.0f} s")
        elif kind == "InProgress":
            self._heard, self._running = now, self._running or now
            self._over(now - self._running, self._waits.running, "still runs at fal", "it goes on")
            self._progress(f"fal is at work, {now - self._running:.0f} s. {_last_line(status.logs)}".strip())
        elif now - self._heard > self._waits.silence:
            if kind == "Completed":
                raise Unobtainable(f"fal has completed the request {self._id}, but its result could not be fetched.")
            raise RemoteError(f"there was no usable answer from fal for {self._waits.silence:g} s. {RUN_AGAIN}")
        else:
            self._progress(f"no usable answer from fal for {now - self._heard:.0f} s, asking again")

    def _over(self, waited: float, limit: float, what: str, then: str) -> None:
        if waited > limit:
            raise RemoteError(f"the request {self._id} {what} after {limit:g} s; {then}. {RUN_AGAIN}")


def _last_line(logs: Any) -> str:
    """The newest message of fal's logs, as far as they are what they should be."""
    last = logs[-1] if isinstance(logs, list) and logs else None
    message = last.get("message") if isinstance(last, dict) else None
    return " ".join(message.split())[:200] if isinstance(message, str) else ""
