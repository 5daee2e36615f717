"""Submitting: the only place from which a request leaves, and it leaves once."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import Any

from .errors import RESUBMIT, AnswerLost, NotAccepted, RemoteError
from .journal import FAILED, LOST, SUBMITTED, Row
from .order import check_cost
from .session import Session
from .uploads import addresses


async def submit(session: Session) -> Row:
    """Submit; what certainly was not taken is tried again a few times. The row as SUBMITTED.

    Raises:
        NotAccepted: fal certainly did not take it (the row is FAILED), or it is too expensive (there is no row).
        AnswerLost: whether fal took it is unknown (the row is LOST).
    """
    waits, tried = session.waits, 0
    while True:
        try:
            return await _once(session)
        except NotAccepted as error:
            after, tried = error.retry_after, tried + 1
            if after is None or after > waits.retry_after or tried == waits.tries:
                raise
            session.progress(f"{error} Trying again.")
            await asyncio.sleep(max(after, waits.backoff * 2 ** (tried - 1)))


async def _once(session: Session) -> Row:
    """Journal the request, then POST it once.

    An interrupt waits for an answer under way, so that it is known what to cancel.
    """
    order, journal = session.order, session.journal
    check_cost(order.cost_usd, session.options.max_cost_usd)
    body = order.body(*await addresses(session))
    session.progress(f"${order.cost_usd:.4f}: submitting to fal")
    try:
        row = journal.begin(order.fingerprint, order.endpoint, order.cost_usd)
    except sqlite3.IntegrityError:
        raise RemoteError("another run has just submitted the same inputs; run again to collect its result.") from None
    sending = asyncio.ensure_future(_send(session, row, body))
    try:
        return await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.wait({sending}, timeout=session.waits.grace)
        if sending.cancel():  # False where the answer came in time
            journal.update(row, LOST, error="the run was interrupted before fal's answer came.")
        raise


async def _send(session: Session, row: Row, body: dict[str, Any]) -> Row:
    journal = session.journal
    try:
        request_id = await session.api.submit(row.endpoint, body)
    except NotAccepted as error:
        journal.update(row, FAILED, error=str(error))
        raise
    except AnswerLost as error:
        with contextlib.suppress(sqlite3.Error):  # the next run takes SUBMITTING for lost, too
            journal.update(row, LOST, error=str(error))
        raise AnswerLost(f"{error} {RESUBMIT}") from None
    try:
        return journal.update(row, SUBMITTED, request_id=request_id)
    except sqlite3.Error as error:
        raise RemoteError(
            f"fal took the request as {request_id}, but {journal.path} cannot be written ({error}). Free some space, "
            f"then run with recover_request_id {request_id}."
        ) from None
