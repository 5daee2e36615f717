"""Waiting for a request that fal took, and cancelling it. Nothing here submits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import time
from typing import Any

from .errors import RESUBMIT, RUN_AGAIN, Cancelled, Failed, RemoteError, Unobtainable
from .interrupt import within
from .journal import CANCELLED, CANCELLING, COMPLETED, FAILED, LOST, SUBMITTED, Row
from .results import save
from .session import Session

UNKNOWN_POLLS = 5  # fal must say so often that it does not know a request: just after a submission it may not yet
MAX_LINE = 200  # letters of fal's logs


async def wait(session: Session, row: Row) -> Row:
    """Look at the request until fal says how it ended; the row as COMPLETED (or, where it was to be cancelled, ended).

    Raises:
        Failed, Cancelled: fal's last word (the row has ended).
        Unobtainable: fal does not know it, or does not give the result.
        RemoteError: it takes too long, or the key is refused (the row stays as it is).
    """
    watch = Watch(row.request_id, session)
    unknown = 0
    while True:
        status = response = None
        try:
            status = await session.api.status(row.request_id)
            if type(status).__name__ in ("Queued", "InProgress"):
                unknown = 0
            elif status is not None:
                response = await session.api.result(row.request_id, status.error, status.error_type)
        except Unobtainable:
            unknown += 1
            if unknown == UNKNOWN_POLLS:
                raise
        except (Failed, Cancelled) as error:
            ended = session.journal.update(row, FAILED if isinstance(error, Failed) else CANCELLED, error=str(error))
            if row.state == CANCELLING:
                return ended
            raise
        if response is not None:
            return session.journal.update(row, COMPLETED, response=json.dumps(response))
        watch.look(status)
        await asyncio.sleep(session.waits.poll)


async def cancel(session: Session, row: Row | None) -> None:
    """After an interrupt: cancel at fal and see that it is so. A request that was completed first is fetched instead.

    Never raises; what could not be done is said, and the row tells the next run.
    """
    if row is not None and row.state == LOST:
        session.progress(f"{row.error} {RESUBMIT}")
    if row is None or row.state not in (SUBMITTED, CANCELLING):
        return
    try:
        row = await within(session.waits.grace, _cancel(session, row))
        said = f"{row.state} at fal"
        if row.state == COMPLETED:
            with contextlib.suppress(RemoteError, sqlite3.Error, asyncio.TimeoutError):  # the next run fetches it
                await within(session.waits.grace, save(session, row))
            said = "fal had completed the request; its result is kept, and running again collects it"
    except (Failed, Cancelled) as error:
        said = str(error)
    except (RemoteError, sqlite3.Error, asyncio.TimeoutError) as error:
        reason = str(error).rstrip(".") or f"no confirmation within {session.waits.grace:g} s"
        said = (
            f"interrupted, but the cancellation is not confirmed: {reason}. It may go on and be charged; the next run "
            "of the same inputs collects it, or submits anew if fal says that it was cancelled."
        )
        logging.warning("klein-cns: request %s: %s", row.request_id, said)
    session.progress(said)


async def _cancel(session: Session, row: Row) -> Row:
    with contextlib.suppress(sqlite3.Error):  # a full disk must not keep fal from being asked
        row = session.journal.update(row, CANCELLING)
    try:
        if not await _ask(session, row.request_id):
            row = session.journal.update(row, SUBMITTED)  # it was completed already
    except RemoteError:
        session.journal.update(row, SUBMITTED)
        raise
    return await wait(session, row)


async def _ask(session: Session, request_id: str) -> bool:
    for left in reversed(range(UNKNOWN_POLLS)):
        try:
            return await session.api.cancel(request_id)
        except Unobtainable:
            if not left:
                raise
            await asyncio.sleep(session.waits.poll)


class Watch:
    """Shows how a request is getting on, and says when it has taken too long. Nothing is cancelled for that."""

    def __init__(self, request_id: str, session: Session) -> None:
        self._id, self._hide = request_id, session.api.hide
        self._waits, self._progress = session.waits, session.progress
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
            said = self._hide(_last_line(status.logs))[:MAX_LINE]
            self._progress(f"fal is at work, {now - self._running:.0f} s. {said}".strip())
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
    return message if isinstance(message, str) else ""
