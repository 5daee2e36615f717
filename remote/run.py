"""One remote run: a small state machine over the journal's row. Every state is written before the next step begins.

    (none), cancelled, failed, replaced  -> submit -> submitted | lost | failed
    submitting, its process died         -> lost
    lost                                 -> an error; with resubmit_lost -> replaced
    submitted, cancelling                -> wait   -> completed | failed | cancelled, by fal's own word alone
    completed                            -> save   -> saved
    saved                                -> the result, as often as it is asked for
    what fal no longer has               -> an error; with resubmit_lost, and from an earlier run, -> replaced
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import filelock

from .client import ADDRESS, REQUEST_ID, Api
from .errors import RESUBMIT, RESUBMIT_GONE, RUN_AGAIN, AnswerLost, NotAccepted, RemoteError, Unobtainable
from .fields import EDIT_ENDPOINT
from .interrupt import run_interruptibly
from .journal import COMPLETED, ENDED, LOST, REPLACED, SAVED, SUBMITTED, SUBMITTING, Journal, Row
from .order import Order
from .results import Collected, Spoiled, collect, save
from .session import Options, Session, Waits
from .submit import submit
from .wait import cancel, wait

__all__ = ["ADDRESS", "Options", "run"]

JOURNAL, LOCKS = "journal.sqlite", "locks"
RECOVERED = "recovered:"  # in place of the fingerprint, where the inputs are not known


def run(
    order: Order | None, options: Options, key: str, address: str | None, folder: Path, results: Path,
    check: Callable[[], None], progress: Callable[[str], None], waits: Waits = Waits(),  # noqa: B008 - frozen
) -> Collected:
    """Collect the result of an order, submitting it only where no earlier run did.

    Args:
        order: what is asked for. With ``recover_request_id`` it may be None; only its lost submission matters then.
        key: of the fal account.
        address: in place of fal's queue; None for fal's own.
        folder: the journal's.
        results: the folder for pictures.
        check: raises where the run is to stop; the request is then cancelled at fal before that rises.
        progress: called with lines to show.

    Raises:
        RemoteError: in words, with what became of the request.
    """
    try:
        for made in (folder, folder / LOCKS):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RemoteError(
            f"{folder} cannot be used ({error.strerror}): the journal is there, and nothing is submitted without it."
        ) from None

    async def work() -> Collected:
        hide = [] if order is None else [order.arguments["prompt"], order.arguments["negative_prompt"]]
        with closing(Journal(folder / JOURNAL)) as journal:
            async with Api(key, address, waits, hide) as api:
                return await _run(Session(order, options, journal, api, waits, results, progress))

    try:
        return run_interruptibly(work, check)
    except sqlite3.Error as error:
        raise RemoteError(
            f"the journal {folder / JOURNAL} cannot be used ({error}), and nothing was submitted. Free some space; "
            "if the file is damaged, move it away, and look at fal.ai/dashboard/requests for what is still open."
        ) from None


async def _run(session: Session) -> Collected:
    journal, recovering = session.journal, session.options.recover_request_id
    fingerprint = RECOVERED + recovering if recovering else session.order.fingerprint
    async with _alone(session, session.order.fingerprint if session.order else fingerprint):
        row = _attach(session, fingerprint) if recovering else journal.find(fingerprint)
        earlier = row and row.id  # what this run found; only that may be given up for another submission
        try:
            while True:
                while row is None or row.state != SAVED:
                    row = await _step(session, row, earlier)
                if recovering:
                    _settle(session, row)
                cost = 0.0 if row.id == earlier else session.order.cost_usd
                order = None if recovering else session.order
                collected = collect(row, session.results, order, cost, session.options.on_flagged == "error")
                if collected is not None:
                    return collected
                row = journal.update(row, COMPLETED)  # a file is gone: fetch it again
        except Spoiled as error:
            files = [name if i != error.index else "" for i, name in enumerate(row.files)]
            journal.update(row, COMPLETED, files=files)
            raise RemoteError(f"{error} Running again fetches it anew, and submits nothing.") from None
        except sqlite3.Error as error:
            if row is None or row.state in ENDED or row.request_id is None:
                raise
            raise RemoteError(
                f"the journal {journal.path} cannot be written ({error}). The request {row.request_id} was submitted; "
                f"free some space. {RUN_AGAIN}"
            ) from None
        except asyncio.CancelledError:
            await cancel(session, journal.find(fingerprint))
            raise


async def _step(session: Session, row: Row | None, earlier: int | None) -> Row:
    """One step of the machine: the row in its next state."""
    journal, options = session.journal, session.options
    if row is None or row.state in ENDED:
        if options.recover_request_id:
            raise RemoteError(f"the request {options.recover_request_id} ended at fal without a result.")
        return await submit(session)
    if row.state == SUBMITTING:  # nobody else is at work on these inputs, so its process has died
        return journal.update(row, LOST, error="the machine stopped while the submission was under way.")
    if row.state == LOST:
        if options.resubmit_lost:
            return journal.update(row, REPLACED)
        raise AnswerLost(f"an earlier run submitted the same inputs: {row.error} {RESUBMIT}")
    try:
        return await (save(session, row) if row.state == COMPLETED else wait(session, row))
    except Unobtainable as error:
        if options.recover_request_id:
            raise
        if row.id == earlier and options.resubmit_lost:
            return journal.update(row, REPLACED)
        raise Unobtainable(f"{error} {RESUBMIT_GONE}") from None


def _attach(session: Session, fingerprint: str) -> Row:
    """The row of a request that the user names; it is never submitted."""
    request_id = session.options.recover_request_id
    if not REQUEST_ID.fullmatch(request_id):
        raise NotAccepted(f"recover_request_id {request_id[:80]!r} is no request id; see fal.ai/dashboard/requests.")
    row = session.journal.find_request(request_id) or session.journal.find(fingerprint)
    if row is None or row.state in ENDED:
        row = session.journal.begin(fingerprint, EDIT_ENDPOINT, None, SUBMITTED, request_id=request_id)
    return row


def _settle(session: Session, row: Row) -> None:
    """Make what was recovered the result of the same inputs too, if their submission was lost.

    A request of other inputs, or with another seed, is not theirs.
    """
    order, journal = session.order, session.journal
    lost = order and journal.find(order.fingerprint)
    if not lost or lost.state not in (SUBMITTING, LOST) or not row.fingerprint.startswith(RECOVERED):
        return
    if json.loads(row.response).get("seed") in (None, order.arguments["seed"]):
        journal.update(lost, SAVED, request_id=row.request_id, response=row.response, files=row.files)


@asynccontextmanager
async def _alone(session: Session, fingerprint: str) -> AsyncIterator[None]:
    """Wait until nobody else is at work on the same inputs. The system frees the lock when its process ends."""
    lock = filelock.FileLock(session.journal.path.parent / LOCKS / f"inputs-{fingerprint[-3:]}")
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except filelock.Timeout:
            session.progress("the same inputs are being run already; waiting for that run")
            await asyncio.sleep(session.waits.poll)
    try:
        yield
    finally:
        lock.release()
