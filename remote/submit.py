"""Submitting: the only place from which a request leaves, and it leaves once."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime
from typing import Any

from .errors import RESUBMIT, AnswerLost, NotAccepted, RemoteError
from .journal import FAILED, LOST, SUBMITTED, JournalError, OverLimit, Row, Taken, day_start
from .order import Order, check_cost
from .session import Session
from .uploads import addresses


async def submit(session: Session, order: Order) -> Row:
    """Submit; what certainly was not taken is tried again a few times. The row as SUBMITTED.

    Raises:
        NotAccepted: fal certainly did not take it (the row is FAILED), or it is too expensive (there is no row).
        AnswerLost: whether fal took it is unknown (the row is LOST).
    """
    waits, tried = session.waits, 0
    while True:
        try:
            return await _once(session, order)
        except NotAccepted as error:
            after, tried = error.retry_after, tried + 1
            if after is None or after > waits.retry_after or tried == waits.tries:
                raise
            session.progress(f"{error} Trying again.")
            await asyncio.sleep(max(after, waits.backoff * 2 ** (tried - 1)))


async def _once(session: Session, order: Order) -> Row:
    """Journal the request, then POST it once.

    An interrupt waits for an answer under way, so that it is known what to cancel.
    """
    journal = session.journal
    check_cost(order.cost_usd, session.options.max_cost_usd)
    body = order.body(*await addresses(session, order))
    session.progress(f"${order.cost_usd:.4f}: submitting to fal")
    row = _begin(session, order)
    sending = asyncio.ensure_future(_send(session, row, body))
    try:
        return await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.wait({sending}, timeout=session.waits.grace)
        if sending.cancel():  # False where the answer came in time
            with contextlib.suppress(JournalError):  # the next run takes SUBMITTING for lost, too
                journal.update(row, LOST, error="the run was interrupted before fal's answer came.")
        elif not sending.cancelled():
            sending.exception()  # it is said elsewhere; asyncio would log it as never retrieved
        raise


def _begin(session: Session, order: Order) -> Row:
    """The row that is the permission to submit.

    Raises:
        NotAccepted: it would be more than may be spent today.
        RemoteError: another run has it.
    """
    limit = session.options.max_usd_a_day
    today = None if limit == 0 else (day_start(datetime.now().astimezone()), limit)
    try:
        return session.journal.begin(order.fingerprint, order.endpoint, order.cost_usd, limit=today)
    except Taken:
        raise RemoteError(
            "another run has just submitted the same inputs. Run again with the same seed to collect its result."
        ) from None
    except OverLimit as error:
        raise NotAccepted(
            f"this request costs ${order.cost_usd:.4f}, and ${error.spent:.4f} were spent today: together more than "
            f"max_usd_a_day {limit:g}; nothing was submitted. Raise max_usd_a_day, or wait for tomorrow."
        ) from None


async def _send(session: Session, row: Row, body: dict[str, Any]) -> Row:
    journal = session.journal
    try:
        request_id = await session.api.submit(row.endpoint, body)
    except NotAccepted as error:
        try:
            journal.update(row, FAILED, error=str(error))
        except JournalError as fault:
            raise NotAccepted(f"{error} {journal.path} cannot be written either ({fault}); free some space.") from None
        raise
    except AnswerLost as error:
        with contextlib.suppress(JournalError):  # the next run takes SUBMITTING for lost, too
            journal.update(row, LOST, error=str(error))
        raise AnswerLost(f"{error} {RESUBMIT}") from None
    try:
        return journal.update(row, SUBMITTED, request_id=request_id)
    except JournalError as error:
        raise RemoteError(
            f"fal took the request as {request_id}, but {journal.path} cannot be written ({error}). Free some space, "
            f"then run with recover_request_id {request_id}, the same inputs and the same seed."
        ) from None
