"""Running an order against the fake server, as the node does."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fal_server import KEY, FalServer
from klein_cns.remote.journal import NAME as JOURNAL
from klein_cns.remote.limits import Waits
from klein_cns.remote.order import Order, make_order
from klein_cns.remote.results import Collected
from klein_cns.remote.run import Recovery, Submission, run
from klein_cns.sampler import CNSParams
from PIL import Image

# The limits that a test is about, it sets itself.
QUICK = Waits(poll=0.02, gone=0.1, tries=3, backoff=0.02, longest_backoff=0.03, retry_after=1.0)
PROMPT = "Dress the chairwoman in tweed"
ROOT = Path(__file__).resolve().parents[1]
NEW_FIELD = '    softness: float = number(0.5, 0.0, 2.0, 0.1, "How soft the picture is.")\n'


def order(pictures: int = 1, loras: Any = (), **changed: Any) -> Order:
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": 5,
        "image_size": "auto",
        **CNSParams(enable_cns=False).to_endpoint(),
        "num_images": 1,
        **changed,
    }
    return make_order(arguments, [Image.new("RGB", (64 + i, 48), "navy") for i in range(pictures)], loras)


class Machine:
    """One user's folders, and runs on them."""

    def __init__(self, base: Path, server: FalServer) -> None:
        self.folder, self.results, self.address = base / "user", base / "output" / "klein_fal", server.url
        self.said: list[str] = []

    def run(
        self,
        ordered: Order | None = None,
        check: Callable[[], None] = lambda: None,
        waits: Waits = QUICK,
        **options: Any,
    ) -> Collected:
        """``options`` by the names of the node's inputs."""
        refuse_flagged = options.pop("on_flagged", "error") == "error"
        request_id = options.pop("recover_request_id", None)
        if request_id is None:
            task: Any = Submission(order=ordered or order(), **options)
        else:
            task = Recovery(request_id=request_id, order=ordered)
        return run(
            task,
            key=KEY,
            address=self.address,
            folder=self.folder,
            results=self.results,
            check=check,
            progress=self.said.append,
            refuse_flagged=refuse_flagged,
            waits=waits,
        )

    def rows(self) -> list[sqlite3.Row]:
        """The journal, oldest first; empty where nothing was journaled."""
        if not (self.folder / JOURNAL).is_file():
            return []
        database = sqlite3.connect(self.folder / JOURNAL)
        database.row_factory = sqlite3.Row
        rows = database.execute("SELECT * FROM requests ORDER BY id").fetchall()
        database.close()
        return rows

    def state(self) -> str | None:
        rows = self.rows()
        return rows[-1]["state"] if rows else None


class Interrupt(BaseException):
    """As ComfyUI's InterruptProcessingException: not an Exception."""


@pytest.fixture(name="fal")
def fal_fixture() -> Iterator[FalServer]:
    server = FalServer()
    yield server
    server.close()


@pytest.fixture(name="machine")
def machine_fixture(fal: FalServer, tmp_path: Path) -> Machine:
    return Machine(tmp_path, fal)


def with_a_new_field(folder: Path) -> None:
    """A copy of the package with one line more in remote/fields.py, as CONTRIBUTING says."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "tests"))
    path = folder / "remote" / "fields.py"
    text, last = path.read_text(), '    output_format: str = _options("png"'
    line = text.index("\n", text.index(last)) + 1
    path.write_text(text[:line] + NEW_FIELD + text[line:])
