"""Waiting for a request that fal took, and cancelling it. Nothing here submits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3

from .errors import RESUBMIT, Cancelled, Failed, RemoteError, Unobtainable
from .interrupt import within
from .journal import CANCELLED, CANCELLING, COMPLETED, FAILED, LOST, SUBMITTED, Row
from .results import save
from .session import Session
from .waits import Watch

UNKNOWN_POLLS = 5  # fal must say so often that it does not know a request: just after a submission it may not yet


async def wait(session: Session, row: Row) -> Row:
    """Look at the request until fal says how it ended; the row as COMPLETED (or, where it was to be cancelled, ended).

    Raises:
        Failed, Cancelled: fal's last word (the row has ended).
        Unobtainable: fal does not know it, or does not give the result.
        RemoteError: it takes too long, or the key is refused (the row stays as it is).
    """
    watch = Watch(row.request_id, session.waits, session.progress)
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
        reason = str(error) or f"no confirmation within {session.waits.grace:g} s"
        said = (
            f"interrupted, but the cancellation is not confirmed: {reason} It may go on and be charged; the next run of "
            "the same inputs collects it, or submits anew if fal says that it was cancelled."
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
