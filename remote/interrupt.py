"""Asynchronous work in a thread of its own, which the caller's thread can interrupt at any moment.

ComfyUI runs nodes inside an event loop that a sampler blocks for minutes: polls would starve there, and a submission's
answer would seem to time out. So the work has its own loop, and the node's thread only waits and looks for interrupts.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")
THREAD = "klein-fal"


def run_interruptibly(work: Callable[[], Awaitable[Result]], check: Callable[[], None], every: float = 0.1) -> Result:
    """The result of ``work()``.

    Args:
        work: makes the coroutine; it is cancelled on an interrupt and may take its time to tidy up.
        check: called every ``every`` seconds; an interrupt is whatever it raises, and rises once the work has ended.
    """
    check()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result]]] = Future()
    done: Future[Result] = Future()

    async def main() -> Result:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
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
            wait([done], timeout=every)
    except BaseException:
        loop, task = started.result()
        with contextlib.suppress(RuntimeError):  # the loop has closed: the work ended just now
            loop.call_soon_threadsafe(task.cancel)
        wait([done])
        raise
    return done.result()
