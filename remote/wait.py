"""Waiting for a request that fal took, and cancelling it. Nothing here submits."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3

from .errors import RUN_AGAIN, Cancelled, Failed, RemoteError, Unobtainable
from .interrupt import within
from .journal import CANCELLED, CANCELLING, COMPLETED, FAILED, SAVED, SUBMITTED, Row
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
    if row is None or row.state not in (SUBMITTED, CANCELLING):
        return
    try:
        row = await within(session.waits.grace, _cancel(session, row))
        said = "fal had completed the request; its result is kept" if row.state == SAVED else f"{row.state} at fal"
    except (Failed, Cancelled) as error:
        said = str(error)
    except (RemoteError, sqlite3.Error, asyncio.TimeoutError) as error:
        reason = str(error) or f"no confirmation within {session.waits.grace:g} s"
        said = f"interrupted, but the cancellation is not confirmed: {reason} It may go on and be charged. {RUN_AGAIN}"
        logging.warning("klein-cns: request %s: %s", row.request_id, said)
    session.progress(said)


async def _cancel(session: Session, row: Row) -> Row:
    asked = session.journal.update(row, CANCELLING)
    try:
        if not await session.api.cancel(row.request_id):
            asked = session.journal.update(row, SUBMITTED)  # it was completed already
    except Unobtainable:
        pass  # the polls below say whether fal really does not know it
    except RemoteError:
        session.journal.update(row, SUBMITTED)
        raise
    try:
        row = await wait(session, asked)
    except Unobtainable:
        if asked.state != CANCELLING:
            raise
        return session.journal.update(row, CANCELLED)
    return await save(session, row) if row.state == COMPLETED else row
