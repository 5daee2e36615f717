"""What every step of a run needs at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import Api
from .journal import Journal
from .limits import Waits
from .order import Order


@dataclass(frozen=True)
class Options:
    """What does not change the result: the limits of the cost, and what to do about earlier submissions."""

    max_cost_usd: float = 0.5
    recover_request_id: str = ""
    resubmit_lost: bool = False
    on_flagged: str = "error"
    max_usd_a_day: float = 0.0


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
