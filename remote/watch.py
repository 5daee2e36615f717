"""Waiting for a request that fal took, and cancelling it. Nothing here submits."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress

from .errors import (
    RESUBMIT,
    RUN_AGAIN,
    Cancelled,
    Failed,
    JournalError,
    NoAnswer,
    Refused,
    RemoteError,
    Unobtainable,
)
from .journal import CANCELLED, CANCELLING, COMPLETED, FAILED, LOST, SUBMITTED, Entry
from .limits import FAILED_LOOKS, LOOKS, within
from .queue import DONE, QUEUED, RUNNING, Status
from .results import parse_response, save
from .transfer import Session

MAX_LINE = 200  # letters of fal's logs


async def wait(session: Session, row: Entry) -> Entry:
    """Look at the request until fal says how it ended.

    An answer is a result only if it holds pictures. A fault is believed once fal has repeated it several times in a
    row, and for minutes where the next look may well bring the result.

    Args:
        session: holds the queue and the journal.
        row: has fal's id.

    Returns:
        the row as COMPLETED; where it was to be cancelled, as it ended.

    Raises:
        Failed, Cancelled: fal says that it ended so, and so does the row.
        Unobtainable: fal does not know it, or does not give the result.
        RemoteError: it takes too long, or the key is refused (the row stays as it is).
    """
    queue, journal, request_id = session.queue, session.journal, row.known_id
    watch = Watch(request_id, session)
    while True:
        try:
            status = await queue.status(request_id)
            if status.state == DONE:
                watch.done = True
                response = await queue.result(request_id, status)
                parse_response(response)
                return journal.update(row, COMPLETED, response=queue.secrets.hide_key(json.dumps(response)))
            watch.goes_on(status)
        except Failed as error:
            if watch.believes(error, 1 if error.certain else FAILED_LOOKS):
                ended = journal.update(row, CANCELLED if isinstance(error, Cancelled) else FAILED, error=str(error))
                if row.state == CANCELLING:
                    return ended
                raise
        except Refused as error:
            if watch.believes(error, LOOKS):
                raise Refused(f"{error} {RUN_AGAIN}") from None
        except Unobtainable as error:
            if watch.believes(error, LOOKS, session.waits.gone):
                raise
        except NoAnswer as error:
            watch.hears_nothing(error)
        watch.check_silence()
        await asyncio.sleep(session.waits.poll)


async def cancel(session: Session, row: Entry | None) -> None:
    """Cancel a request at fal after an interrupt, and make sure of it. A request that completed first is fetched.

    It never raises: a line says what could not be done, and the row tells the next run.
    """
    if row is not None and row.state == LOST:
        session.progress(f"{row.error} {RESUBMIT}")
    if row is None or row.state not in (SUBMITTED, CANCELLING):
        return
    try:
        row = await within(session.waits.grace, _ask_and_wait(session, row))
        said = f"{row.state} at fal"
        if row.state == COMPLETED:
            with suppress(RemoteError, JournalError, asyncio.TimeoutError):  # the next run fetches it
                await within(session.waits.grace, save(session, row))
            said = (
                "fal had completed the request; its result is kept, and running again with the same inputs and the "
                "same seed collects it"
            )
    except Failed as error:
        said = str(error)
    except (RemoteError, JournalError, asyncio.TimeoutError) as error:
        reason = str(error).rstrip(".") or f"no confirmation within {session.waits.grace:g} s"
        said = (
            f"interrupted, but the cancellation is not confirmed: {reason}. It may go on and be charged, as request "
            f"{row.request_id}; the next run with the same inputs and the same seed collects it, or submits again if "
            "fal says that it was cancelled."
        )
        logging.warning("klein-cns: request %s: %s", row.request_id, said)
    session.progress(said)


async def _ask_and_wait(session: Session, row: Entry) -> Entry:
    with suppress(JournalError):  # a full disk must not keep fal from being asked
        row = session.journal.update(row, CANCELLING)
    try:
        if not await _ask(session, row.known_id):
            row = session.journal.update(row, SUBMITTED)  # it was completed already
    except RemoteError:
        session.journal.update(row, SUBMITTED)
        raise
    return await wait(session, row)


async def _ask(session: Session, request_id: str) -> bool:
    for left in reversed(range(LOOKS)):
        try:
            return await session.queue.cancel(request_id)
        except Unobtainable:
            if not left:
                raise
            await asyncio.sleep(session.waits.poll)
    raise AssertionError("the last try returns or raises")


class Watch:
    """Shows how a request is getting on, and says when it has taken too long. Nothing is cancelled for that."""

    def __init__(self, request_id: str, session: Session) -> None:
        self._id, self._hide = request_id, session.queue.hide
        self._waits, self._progress = session.waits, session.progress
        self._began = self._heard = time.monotonic()
        self._running: float | None = None
        self._verdict: type[RemoteError] | None = None
        self._looks, self._since, self._last = 0, 0.0, "none"
        self.done = False  # whether fal said that the request is completed

    def goes_on(self, status: Status) -> None:
        """Note that the request is queued or running.

        Raises:
            RemoteError: the request was too long in the queue, or on the machine.
        """
        now, self._verdict, self.done = time.monotonic(), None, False
        self._heard = now
        if status.state == QUEUED:
            self._over(now - self._began, self._waits.queue, "still waits in fal's queue", "it stays there")
            if status.position is None:
                place = "in fal's queue"
            elif status.position == 0:
                place = "next in fal's queue"
            else:
                place = f"in fal's queue, position {status.position}"
            self._progress(f"{place}, {now - self._began:.0f} s")
        elif status.state == RUNNING:
            if self._running is None:
                self._running = now
            self._over(now - self._running, self._waits.running, "still runs at fal", "it goes on")
            said = self._hide(status.log)[:MAX_LINE]
            self._progress(f"fal is at work, {now - self._running:.0f} s. {said}".strip())

    def hears_nothing(self, error: NoAnswer) -> None:
        """Note a look that brought nothing."""
        self._verdict, self._last = None, str(error)
        self._progress(f"no usable answer from fal for {time.monotonic() - self._heard:.0f} s, asking again")

    def believes(self, error: RemoteError, looks: int, seconds: float = 0.0) -> bool:
        """Whether fal has repeated a fault often and long enough.

        Args:
            error: is the fault.
            looks: count how often in a row it must be said.
            seconds: say for how long.
        """
        now = time.monotonic()
        if type(error) is not self._verdict:
            self._verdict, self._looks, self._since = type(error), 0, now
        self._looks, self._last = self._looks + 1, str(error)
        if self._looks >= looks and now - self._since >= seconds:
            return True
        self._progress(f"{error} Asking again.")
        return False

    def check_silence(self) -> None:
        """Raise RemoteError where there was no usable answer for too long."""
        if time.monotonic() - self._heard <= self._waits.silence:
            return
        for_long = f"for {self._waits.silence:g} s. {RUN_AGAIN}"
        if self.done:
            raise RemoteError(
                f"fal has completed the request {self._id}, but its result could not be fetched {for_long} "
                f"resubmit_lost does not buy it again as long as fal may still have it. The last answer: {self._last}"
            )
        raise RemoteError(
            f"there was no usable answer from fal {for_long} The request {self._id} may go on there. The last answer: "
            f"{self._last}"
        )

    def _over(self, waited: float, limit: float, what: str, then: str) -> None:
        if waited > limit:
            raise RemoteError(f"the request {self._id} {what} after {limit:g} s; {then}. {RUN_AGAIN}")
