"""The journal: what was submitted, under which id, and how far it is. Written before anything leaves.

One row a submission. At most one row of a fingerprint is alive (a unique index holds that), so the row itself is the
permission to submit: two processes cannot both have it.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

SUBMITTING = "submitting"  # the request is about to leave, or left without an answer when its process died
LOST = "lost"  # it left, and whether fal took it is unknown
SUBMITTED = "submitted"  # fal took it, the id is known
CANCELLING = "cancelling"  # fal was asked to cancel and has not confirmed yet
COMPLETED = "completed"  # the response is here, its pictures are not
SAVED = "saved"  # the pictures are files
CANCELLED, FAILED, REPLACED = "cancelled", "failed", "replaced"
ENDED = (CANCELLED, FAILED, REPLACED)  # nothing to collect: the next run submits anew

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, endpoint TEXT NOT NULL, state TEXT NOT NULL, request_id TEXT,
    cost_usd REAL, created TEXT NOT NULL, updated TEXT NOT NULL, response TEXT, files TEXT NOT NULL, error TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS alive ON requests (fingerprint) WHERE state NOT IN {ENDED!r};
CREATE TABLE IF NOT EXISTS uploads (sha256 TEXT PRIMARY KEY, url TEXT NOT NULL, created TEXT NOT NULL);
"""


class Row(NamedTuple):
    """One submission. ``files`` are names in the results folder, one a picture, empty until it is there."""

    id: int
    fingerprint: str
    endpoint: str
    state: str
    request_id: str | None
    cost_usd: float | None
    created: str
    updated: str
    response: str | None
    files: tuple[str, ...]
    error: str | None


class Journal:
    """The journal in one SQLite file, in a folder that exists. Used by the thread that made it.

    Raises:
        sqlite3.Error: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = sqlite3.connect(path, timeout=30, isolation_level=None)
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def find(self, fingerprint: str) -> Row | None:
        """The latest submission of these inputs."""
        return self._row("fingerprint = ? ORDER BY id DESC LIMIT 1", fingerprint)

    def find_request(self, request_id: str) -> Row | None:
        """The submission that fal knows under this id, if its result came."""
        return self._row(
            f"request_id = ? AND state IN ('{COMPLETED}', '{SAVED}') ORDER BY id DESC LIMIT 1", request_id
        )

    def begin(
        self, fingerprint: str, endpoint: str, cost_usd: float | None, state: str = SUBMITTING, **columns: Any
    ) -> Row:
        """A new row. Raises sqlite3.IntegrityError where another one of these inputs is alive."""
        now = _now()
        with self._transaction():
            cursor = self._database.execute(
                "INSERT INTO requests (fingerprint, endpoint, state, cost_usd, created, updated, files)"
                " VALUES (?, ?, ?, ?, ?, ?, '[]')",
                (fingerprint, endpoint, state, cost_usd, now, now),
            )
            row = self._row("id = ?", cursor.lastrowid)
        return self.update(row, state, **columns) if columns else row

    def update(self, row: Row, state: str, **columns: Any) -> Row:
        """The row in another state, with other columns changed too."""
        if "files" in columns:
            columns["files"] = json.dumps(columns["files"])
        columns = {**columns, "state": state, "updated": _now()}
        names = ", ".join(f"{name} = ?" for name in columns)
        with self._transaction():
            self._database.execute(f"UPDATE requests SET {names} WHERE id = ?", (*columns.values(), row.id))
        return self._row("id = ?", row.id)

    def uploaded(self, sha256: str) -> str | None:
        """Where a file of this content was uploaded to."""
        found = self._database.execute("SELECT url FROM uploads WHERE sha256 = ?", (sha256,)).fetchone()
        return found[0] if found else None

    def keep_upload(self, sha256: str, url: str) -> None:
        """Remember where a file was uploaded to."""
        with self._transaction():
            self._database.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?)", (sha256, url, _now()))

    @contextmanager
    def _transaction(self) -> Any:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _row(self, where: str, *values: Any) -> Row | None:
        columns = ", ".join(Row._fields)
        found = self._database.execute(f"SELECT {columns} FROM requests WHERE {where}", values).fetchone()
        return found and Row(*found)._replace(files=tuple(json.loads(found[Row._fields.index("files")])))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
