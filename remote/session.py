"""What every step of a run needs at hand, and how long it waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .journal import Journal
from .order import Order

if TYPE_CHECKING:
    from .client import Api


@dataclass(frozen=True)
class Waits:
    """Seconds, and how often to try."""

    poll: float = 1.0  # between two looks at a request
    connect: float = 15.0
    answer: float = 60.0  # for one answer of the API, and between two pieces of a file
    submit: float = 120.0  # for the answer to the submission
    grace: float = 20.0  # after an interrupt: for an answer under way, then for fal to confirm the cancellation
    queue: float = 1800.0  # in fal's queue
    running: float = 900.0  # on fal's machine
    silence: float = 600.0  # without one usable answer
    tries: int = 5  # for what certainly was not taken, and for a file
    backoff: float = 1.0  # before the second try; doubles
    retry_after: float = 60.0  # the longest Retry-After that is waited for


@dataclass(frozen=True)
class Options:
    """What does not change the result: the limit of the cost, and what to do about earlier submissions."""

    max_cost_usd: float = 0.5
    recover_request_id: str = ""
    resubmit_lost: bool = False
    on_flagged: str = "error"


@dataclass(frozen=True)
class Session:
    """One run.

    Args:
        order: what is asked for; with ``recover_request_id`` it may be None.
        results: the folder for pictures.
        progress: called with a line to show.
    """

    order: Order | None
    options: Options
    journal: Journal
    api: Api
    waits: Waits
    results: Path
    progress: Callable[[str], None]
