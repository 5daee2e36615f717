"""One remote run: a small state machine over the journal's row. Every state is written before the next step begins.

(none), cancelled, failed, replaced  -> submit -> submitted | lost | failed
submitting, its process died         -> lost
lost                                 -> an error; with resubmit_lost -> replaced
submitted, cancelling                -> wait   -> completed | failed | cancelled, only when fal says so
completed                            -> save   -> saved
saved                                -> the result, as often as it is asked for
what fal no longer has               -> an error; with resubmit_lost, and from an earlier run, -> replaced
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import filelock

from .errors import (
    RESUBMIT,
    RESUBMIT_GONE,
    RUN_AGAIN,
    AnswerLost,
    JournalError,
    NoPictures,
    NotAccepted,
    OverLimit,
    RemoteError,
    Spoiled,
    Taken,
    Unobtainable,
)
from .fields import EDIT_ENDPOINT
from .journal import (
    COMPLETED,
    ENDED,
    FAILED,
    LOST,
    RECOVERED,
    REPLACED,
    SAVED,
    SUBMITTED,
    SUBMITTING,
    Entry,
    Journal,
    day_start,
    make_folder,
    saved,
)
from .key import Secrets
from .limits import Waits
from .order import Order
from .queue import REQUEST_ID, Queue
from .results import Collected, collect, save
from .transfer import Session, addresses
from .watch import cancel, wait

LOCKS = "locks"
THREAD = "klein-fal"
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Collect the result of an order, and submit it where no earlier run did: ``Submission(order=order)``.

    Args:
        order: holds what to submit, as `make_order` makes it.
        max_cost_usd: bounds the cost of the request; a dearer one is refused.
        max_usd_a_day: bounds the spending since midnight, this request included; 0 sets no limit.
        resubmit_lost: gives up an earlier submission whose fate is unknown, or whose result fal no longer has.
    """

    order: Order
    max_cost_usd: float = 0.5
    max_usd_a_day: float = 0.0
    resubmit_lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Collect a request that fal has, and submit nothing: ``Recovery(request_id="9a7b...")``.

    Args:
        request_id: is fal's name for the request.
        order: holds inputs whose submission may have been this one; if that was lost, the result is theirs. None where
            the inputs are not known.
    """

    request_id: str
    order: Order | None = None


def run(
    task: Submission | Recovery,
    *,
    key: str,
    folder: Path,
    results: Path,
    check: Callable[[], None],
    progress: Callable[[str], None],
    address: str | None = None,
    refuse_flagged: bool = True,
    waits: Waits = Waits(),  # noqa: B008 - frozen
) -> Collected:
    """Do a task to its end, however far an earlier run came with it.

    Usage::

        run(Submission(order=order), key=key, folder=user, results=output, check=check, progress=print).images

    Args:
        task: says whether to submit an order or to recover a request.
        key: opens the fal account.
        folder: holds the journal.
        results: takes the pictures.
        check: raises where the run is to stop; the request is then cancelled at fal before the exception rises.
        progress: takes each line to show.
        address: takes the place of fal's queue; None takes fal's own.
        refuse_flagged: whether a picture that fal's safety checker flagged is an error.
        waits: say how long to wait and how often to try.

    Raises:
        RemoteError: the run failed; the text says why, and what became of the request.
    """
    secrets = Secrets(key)

    async def work() -> Collected:
        hide = [] if task.order is None else [task.order.arguments["prompt"], task.order.arguments["negative_prompt"]]
        async with Queue(key, address=address, waits=waits, hide=hide) as queue:
            session = Session(Journal(folder), queue, waits, results, lambda text: progress(secrets.hide_key(text)))
            steps = _Rescue(session, task) if isinstance(task, Recovery) else _Purchase(session, task)
            return await _drive(session, steps, refuse_flagged)

    try:
        found = _saved_before(task, folder, results, refuse_flagged)
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


def _saved_before(task: Submission | Recovery, folder: Path, results: Path, refuse_flagged: bool) -> Collected | None:
    """The result of an earlier run of the same inputs, where it is saved. Needs nothing but to read it."""
    if not isinstance(task, Submission):
        return None
    row = saved(folder, task.order.fingerprint)
    if row is None:
        return None
    try:
        return collect(row, folder=results, order=task.order, cost_usd=0.0, refuse_flagged=refuse_flagged)
    except (Spoiled, NoPictures):
        return None  # mending it takes writing


def _make_folders(folder: Path) -> None:
    try:
        for made in (folder, folder / LOCKS):
            make_folder(made)
    except OSError as error:
        raise RemoteError(
            f"{folder} cannot be used ({error.strerror}): the journal is there, and nothing is submitted without it. "
            "Let this user write there."
        ) from None


async def _drive(session: Session, steps: _Purchase | _Rescue, refuse_flagged: bool) -> Collected:
    """Take step after step until the pictures are there."""
    async with _alone(session, steps.lock):
        row = steps.start()
        try:
            while True:
                while row is None or row.state != SAVED:
                    row = await steps.next(row)
                steps.settle(row)
                collected = collect(
                    row,
                    folder=session.results,
                    order=steps.order,
                    cost_usd=steps.cost_usd,
                    refuse_flagged=refuse_flagged,
                )
                if collected is not None:
                    return collected
                row = session.journal.update(row, COMPLETED)  # a file is gone: fetch it again
        except Spoiled as error:
            if row is not None:
                files = [name if i != error.index else "" for i, name in enumerate(row.files)]
                session.journal.update(row, COMPLETED, files=files)
            raise RemoteError(
                f"{error} Running again with the same inputs and the same seed fetches it again, and submits nothing."
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
                row = session.journal.find(row.fingerprint if row else steps.fingerprint)
            await cancel(session, row)
            raise


class _Purchase:
    """The steps of a `Submission`."""

    def __init__(self, session: Session, task: Submission) -> None:
        self._session, self._task, self.order = session, task, task.order
        self.lock = self.fingerprint = task.order.fingerprint
        self._bought = False  # by this run, which never gives it up for another submission
        self._asked_anew = False

    @property
    def cost_usd(self) -> float:
        """The price of the request that this run submitted."""
        return self.order.cost_usd if self._bought else 0.0

    def start(self) -> Entry | None:
        """The row that an earlier run left."""
        return self._session.journal.find(self.fingerprint)

    async def next(self, row: Entry | None) -> Entry:
        """The row in its next state."""
        session, journal = self._session, self._session.journal
        if row is None or row.state in ENDED:
            row = await _submit(session, self._task)
            self._bought = True
            return row
        if row.state == SUBMITTING:  # nobody else is at work on these inputs, so its process has died
            return journal.update(row, LOST, error="the machine stopped while the submission was under way.")
        if row.state == LOST:
            if self._task.resubmit_lost:
                return journal.update(row, REPLACED)
            raise AnswerLost(f"an earlier run submitted the same inputs: {row.error} {RESUBMIT}")
        try:
            return await _collect_step(session, row)
        except Unobtainable as error:
            may_buy = self._task.resubmit_lost and not self._bought
            row = journal.find(self.fingerprint) or row  # with the pictures that were saved on the way
            if row.state == COMPLETED and not self._asked_anew and (may_buy or isinstance(error, NoPictures)):
                self._asked_anew = True  # fal may give other addresses, or pictures at last
                return journal.update(row, SUBMITTED)
            if may_buy:
                return journal.update(row, REPLACED)
            raise Unobtainable(f"{error} {RESUBMIT_GONE}") from None

    def settle(self, row: Entry) -> None:
        """Nothing is left to do once the pictures are saved."""


CHECK_ID = "Check recover_request_id: your requests are listed at fal.ai/dashboard/requests."


class _Rescue:
    """The steps of a `Recovery`."""

    order = None  # the pictures need not be those of the inputs
    cost_usd = 0.0

    def __init__(self, session: Session, task: Recovery) -> None:
        if not REQUEST_ID.fullmatch(task.request_id):
            raise NotAccepted(
                f"recover_request_id {task.request_id[:80]!r} is not a request id; see fal.ai/dashboard/requests."
            )
        self._session, self._task = session, task
        self.fingerprint = RECOVERED + task.request_id
        self.lock = task.order.fingerprint if task.order else self.fingerprint

    def start(self) -> Entry:
        """The row of the request, made where there is none."""
        request_id, journal = self._task.request_id, self._session.journal
        row = journal.find_request(request_id) or journal.find(self.fingerprint)
        if row is None or row.state in ENDED:
            return journal.begin(self.fingerprint, EDIT_ENDPOINT, None, request_id=request_id)
        return row if row.request_id else journal.update(row, SUBMITTED, request_id=request_id)

    async def next(self, row: Entry | None) -> Entry:
        """The row in its next state."""
        if row is None or row.state in ENDED:
            raise RemoteError(f"the request {self._task.request_id} ended at fal without a result.")
        try:
            return await _collect_step(self._session, row)
        except NoPictures as error:
            if row.state == COMPLETED:
                return self._session.journal.update(row, SUBMITTED)
            raise Unobtainable(f"{error} {RUN_AGAIN}") from None
        except Unobtainable as error:
            if row.state == SUBMITTED and row.fingerprint == self.fingerprint:  # only the user said so
                self._session.journal.update(row, FAILED, error=str(error))
            raise Unobtainable(f"{error} {CHECK_ID}") from None

    def settle(self, row: Entry) -> None:
        """Make what was recovered the result of the same inputs too, if their submission was lost.

        A request of other inputs, or with another seed, is not theirs.
        """
        order, journal = self._task.order, self._session.journal
        lost = order and journal.find(order.fingerprint)
        if not order or not lost or lost.state not in (SUBMITTING, LOST) or not row.fingerprint.startswith(RECOVERED):
            return
        if row.answer.get("seed") in (None, order.arguments["seed"]):
            journal.update(lost, SAVED, request_id=row.request_id, response=row.response, files=row.files)


async def _collect_step(session: Session, row: Entry) -> Entry:
    return await (save(session, row) if row.state == COMPLETED else wait(session, row))


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


# Submitting: the only place from which a request leaves, and it leaves once -------------------------------------------


async def _submit(session: Session, task: Submission) -> Entry:
    """Submit, and try again a few times where fal certainly did not take it. The row as SUBMITTED.

    Raises:
        NotAccepted: fal certainly did not take it (the row is FAILED), or it is too expensive (there is no row).
        AnswerLost: whether fal took it is unknown (the row is LOST).
    """
    waits, tried = session.waits, 0
    while True:
        try:
            return await _submit_once(session, task)
        except NotAccepted as error:
            after, tried = error.retry_after, tried + 1
            if after is None or after > waits.retry_after or tried == waits.tries:
                raise
            session.progress(f"{error} Trying again.")
            await asyncio.sleep(max(after, waits.backoff * 2 ** (tried - 1)))


async def _submit_once(session: Session, task: Submission) -> Entry:
    """Journal the request, then POST it once.

    An interrupt waits for an answer under way, so that it is known what to cancel.
    """
    order, journal = task.order, session.journal
    _check_cost(task)
    body = order.body(*await addresses(session, order))
    session.progress(f"${order.cost_usd:.4f}: submitting to fal")
    row = _begin(session.journal, task)
    sending = asyncio.ensure_future(_send(session, row, body))
    try:
        return await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.wait({sending}, timeout=session.waits.grace)
        if sending.cancel():  # False where the answer came in time
            with suppress(JournalError):  # the next run takes SUBMITTING for lost, too
                journal.update(row, LOST, error="the run was interrupted before fal's answer came.")
        elif not sending.cancelled():
            sending.exception()  # it is said elsewhere; asyncio would log it as never retrieved
        raise


def _check_cost(task: Submission) -> None:
    cost, limit = task.order.cost_usd, task.max_cost_usd
    if not cost <= limit + 1e-9:  # so that NaN lets nothing pass
        raise NotAccepted(
            f"this request costs ${cost:.4f}, more than max_cost_usd {limit:g}; nothing was submitted. Raise "
            "max_cost_usd, or ask for fewer or smaller pictures."
        )


def _begin(journal: Journal, task: Submission) -> Entry:
    """The row that is the permission to submit.

    Raises:
        NotAccepted: it would be more than may be spent today.
        RemoteError: another run has it.
    """
    order, limit = task.order, task.max_usd_a_day
    today = None if limit == 0 else (day_start(datetime.now().astimezone()), limit)
    try:
        return journal.begin(order.fingerprint, order.endpoint, order.cost_usd, limit=today)
    except Taken:
        raise RemoteError(
            "another run has just submitted the same inputs. Run again with the same seed to collect its result."
        ) from None
    except OverLimit as error:
        raise NotAccepted(
            f"this request costs ${order.cost_usd:.4f}, and ${error.spent:.4f} were spent today: together more than "
            f"max_usd_a_day {limit:g}; nothing was submitted. Raise max_usd_a_day, or wait for tomorrow."
        ) from None


async def _send(session: Session, row: Entry, body: dict[str, Any]) -> Entry:
    journal = session.journal
    try:
        request_id = await session.queue.submit(row.endpoint, body)
    except NotAccepted as error:
        try:
            journal.update(row, FAILED, error=str(error))
        except JournalError as fault:
            raise NotAccepted(f"{error} {journal.path} cannot be written either ({fault}); free some space.") from None
        raise
    except AnswerLost as error:
        with suppress(JournalError):  # the next run takes SUBMITTING for lost, too
            journal.update(row, LOST, error=str(error))
        raise AnswerLost(f"{error} {RESUBMIT}") from None
    try:
        return journal.update(row, SUBMITTED, request_id=request_id)
    except JournalError as error:
        raise RemoteError(
            f"fal took the request as {request_id}, but {journal.path} cannot be written ({error}). Free some space, "
            f"then run with recover_request_id {request_id}, the same inputs and the same seed."
        ) from None


# The thread of a run -------------------------------------------------------------------------------------------------


def _not_ours(record: logging.LogRecord) -> bool:
    return not (record.threadName or "").startswith(THREAD)


logging.getLogger("httpx").addFilter(_not_ours)  # it would log every poll


def run_interruptibly(work: Callable[[], Awaitable[Result]], check: Callable[[], None], every: float = 0.1) -> Result:
    """The result of ``work()``, which runs in a thread and an event loop of its own.

    ComfyUI runs nodes inside an event loop that a sampler blocks for minutes: polls would starve there, and a
    submission's answer would seem to time out. So the node's thread only waits and looks for interrupts.

    Args:
        work: makes the coroutine; an interrupt cancels it, and it may take its time to tidy up.
        check: raises to interrupt; the exception rises once the work has ended.
        every: seconds between two checks.
    """
    check()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()
    done: Future[Result] = Future()

    async def main() -> Result:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        started.set_result((asyncio.get_running_loop(), task))
        return await work()

    def run() -> None:
        try:
            done.set_result(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001 - it rises in the caller's thread
            done.set_exception(error)

    # a daemon: ending ComfyUI must not wait for fal; the next run collects what was under way
    Thread(target=contextvars.copy_context().run, args=(run,), name=THREAD, daemon=True).start()
    try:
        while not done.done():
            check()
            wait_for([done], timeout=every)
    except BaseException:
        loop, task = started.result()
        with suppress(RuntimeError):  # the loop has closed: the work ended just now
            loop.call_soon_threadsafe(task.cancel)
        wait_for([done])
        raise
    return done.result()
