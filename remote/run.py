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
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import filelock

from .client import ADDRESS, REQUEST_ID, Api
from .errors import RESUBMIT, RESUBMIT_GONE, RUN_AGAIN, AnswerLost, NotAccepted, RemoteError, Unobtainable
from .fields import EDIT_ENDPOINT
from .interrupt import run_interruptibly
from .journal import (
    COMPLETED,
    ENDED,
    LOST,
    RECOVERED,
    REPLACED,
    SAVED,
    SUBMITTED,
    SUBMITTING,
    Journal,
    JournalError,
    Row,
    make_folder,
    saved,
)
from .key import Secrets
from .limits import Waits
from .order import Order
from .response import NoPictures
from .results import Collected, Spoiled, collect, save
from .session import Options, Session
from .submit import submit
from .wait import cancel, wait

__all__ = ["ADDRESS", "Options", "run"]

LOCKS = "locks"


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
    secrets = Secrets(key)

    def say(text: str) -> None:
        progress(secrets.hide_key(text))

    async def work() -> Collected:
        hide = [] if order is None else [order.arguments["prompt"], order.arguments["negative_prompt"]]
        async with Api(key, address, waits, hide) as api:
            return await _run(Session(order, options, Journal(folder), api, waits, results, say))

    try:
        found = _saved_before(order, options, folder, results)
        if found is not None:
            return found
        _make_folders(folder)
        return run_interruptibly(work, check)
    except JournalError as error:
        raise RemoteError(
            f"the journal in {folder} cannot be used ({error}), and nothing was submitted. Free some space, or let "
            "this user write there; if the file is damaged, move it away, and look at fal.ai/dashboard/requests for "
            "what is still open."
        ) from None
    except RemoteError as error:
        shown = secrets.hide_key(str(error))
        if shown != str(error):
            raise RemoteError(shown) from None
        raise


def _saved_before(order: Order | None, options: Options, folder: Path, results: Path) -> Collected | None:
    """The result of an earlier run of the same inputs, where it is saved. Needs nothing but to read it."""
    if order is None or options.recover_request_id:
        return None
    row = saved(folder, order.fingerprint)
    try:
        return row and collect(row, results, order, 0.0, options.on_flagged == "error")
    except (Spoiled, NoPictures):
        return None  # which takes writing to mend


def _make_folders(folder: Path) -> None:
    try:
        for made in (folder, folder / LOCKS):
            make_folder(made)
    except OSError as error:
        raise RemoteError(
            f"{folder} cannot be used ({error.strerror}): the journal is there, and nothing is submitted without it. "
            "Let this user write there."
        ) from None


async def _run(session: Session) -> Collected:
    recovering = session.options.recover_request_id
    fingerprint = RECOVERED + recovering if recovering else session.order.fingerprint
    async with _alone(session, session.order.fingerprint if session.order else fingerprint):
        row = _attach(session, fingerprint) if recovering else session.journal.find(fingerprint)
        steps = _Steps(session)
        try:
            while True:
                while row is None or row.state != SAVED:
                    row = await steps.next(row)
                if recovering:
                    _settle(session, row)
                cost = session.order.cost_usd if steps.bought else 0.0
                order = None if recovering else session.order
                collected = collect(row, session.results, order, cost, session.options.on_flagged == "error")
                if collected is not None:
                    return collected
                row = session.journal.update(row, COMPLETED)  # a file is gone: fetch it again
        except Spoiled as error:
            files = [name if i != error.index else "" for i, name in enumerate(row.files)]
            session.journal.update(row, COMPLETED, files=files)
            raise RemoteError(
                f"{error} Running again with the same inputs and the same seed fetches it anew, and submits nothing."
            ) from None
        except JournalError as error:
            if row is None or row.state in ENDED or row.request_id is None:
                raise
            raise RemoteError(
                f"the journal {session.journal.path} cannot be written ({error}). The request {row.request_id} was "
                f"submitted; free some space. {RUN_AGAIN}"
            ) from None
        except asyncio.CancelledError:
            with suppress(JournalError):  # then what this run knows must do
                row = session.journal.find(row.fingerprint if row else fingerprint)
            await cancel(session, row)
            raise


class _Steps:
    """The steps of one run.

    Attributes:
        bought: whether this run submitted; what it bought it never gives up for another submission.
    """

    def __init__(self, session: Session) -> None:
        self._session, self.bought, self._asked_anew = session, False, False

    async def next(self, row: Row | None) -> Row:
        """The row in its next state."""
        session, journal, options = self._session, self._session.journal, self._session.options
        if row is None or row.state in ENDED:
            if options.recover_request_id or session.order is None:
                raise RemoteError(f"the request {options.recover_request_id} ended at fal without a result.")
            row = await submit(session, session.order)
            self.bought = True
            return row
        if row.state == SUBMITTING or (row.request_id is None and row.state != LOST):
            # nobody else is at work on these inputs, so its process has died
            return journal.update(row, LOST, error="the machine stopped while the submission was under way.")
        if row.state == LOST:
            if options.resubmit_lost:
                return journal.update(row, REPLACED)
            raise AnswerLost(f"an earlier run submitted the same inputs: {row.error} {RESUBMIT}")
        try:
            return await (save(session, row) if row.state == COMPLETED else wait(session, row))
        except Unobtainable as error:
            buying = options.resubmit_lost and not options.recover_request_id and not self.bought
            if row.state == COMPLETED and not self._asked_anew and (buying or isinstance(error, NoPictures)):
                self._asked_anew = True  # fal may give other addresses, or pictures at last
                return journal.update(row, SUBMITTED)
            if buying:
                return journal.update(row, REPLACED)
            raise Unobtainable(f"{error} {RUN_AGAIN if options.recover_request_id else RESUBMIT_GONE}") from None


def _attach(session: Session, fingerprint: str) -> Row:
    """The row of a request that the user names; it is never submitted."""
    request_id = session.options.recover_request_id
    if not REQUEST_ID.fullmatch(request_id):
        raise NotAccepted(f"recover_request_id {request_id[:80]!r} is no request id; see fal.ai/dashboard/requests.")
    row = session.journal.find_request(request_id) or session.journal.find(fingerprint)
    if row is None or row.state in ENDED:
        row = session.journal.begin(fingerprint, EDIT_ENDPOINT, None, request_id=request_id)
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
        except (OSError, NotImplementedError) as error:
            raise RemoteError(
                f"{lock.lock_file} cannot be locked ({getattr(error, 'strerror', None) or error}), and nothing was "
                "submitted: two runs at once could buy twice. Let this user write there, or put ComfyUI's user folder "
                "on a local disk."
            ) from None
    try:
        yield
    finally:
        lock.release()
