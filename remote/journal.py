"""The journal: what was submitted, under which id, and how far it is. Written before anything leaves.

One row a submission. At most one row of a fingerprint is alive (a unique index holds that), so the row itself is the
permission to submit: two processes cannot both have it. Until a submission ends, a file of its own beside the journal
says the same, so that a journal that is deleted, emptied or replaced by an older one leads to no second purchase.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from .errors import JournalError, OverLimit, Taken

NAME = "journal.sqlite"
OPEN = "open"  # folder of the files of submissions that have not ended
RECOVERED = "recovered:"  # in place of the fingerprint, where the inputs are not known

SUBMITTING = "submitting"  # the request is about to leave, or left without an answer when its process died
LOST = "lost"  # it left, and whether fal took it is unknown
SUBMITTED = "submitted"  # fal took it, the id is known
CANCELLING = "cancelling"  # fal was asked to cancel and has not confirmed yet
COMPLETED = "completed"  # the response is here, its pictures are not
SAVED = "saved"  # the pictures are files
CANCELLED, FAILED, REPLACED = "cancelled", "failed", "replaced"
ENDED = (CANCELLED, FAILED, REPLACED)  # nothing to collect: the next run submits again
KNOWN = (SUBMITTED, CANCELLING, COMPLETED, SAVED)  # fal gave an id
UNCHARGED = (CANCELLED, FAILED)

_MEANING = {  # of the states of an open request
    SUBMITTING: "being submitted, or its process died then",
    LOST: "submitted, fal's answer was lost",
    SUBMITTED: "submitted",
    CANCELLING: "to be cancelled, not confirmed",
    COMPLETED: "completed, its pictures are not all fetched",
}
_VERSION = 1
_TABLES = f"""
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, endpoint TEXT NOT NULL, state TEXT NOT NULL, request_id TEXT,
    cost_usd REAL, created TEXT NOT NULL, updated TEXT NOT NULL, response TEXT, files TEXT NOT NULL, error TEXT,
    CHECK (state NOT IN {KNOWN!r} OR request_id IS NOT NULL)
);
CREATE UNIQUE INDEX IF NOT EXISTS alive ON requests (fingerprint) WHERE state NOT IN {ENDED!r};
CREATE TABLE IF NOT EXISTS uploads (sha256 TEXT PRIMARY KEY, url TEXT NOT NULL, created TEXT NOT NULL);
PRAGMA user_version = {_VERSION};
"""
_COLUMNS = "id, fingerprint, endpoint, state, request_id, cost_usd, created, updated, response, files, error"
_FROM_BEFORE = f"""
ALTER TABLE requests RENAME TO before;
DROP INDEX alive;
{_TABLES}
UPDATE before SET state = '{LOST}', error = 'its id was not written down.'
    WHERE state IN {KNOWN!r} AND request_id IS NULL;
INSERT INTO requests SELECT {_COLUMNS} FROM before;
DROP TABLE before;
"""


class Entry(NamedTuple):
    """One submission. ``files`` are names in the results folder, one a picture, empty until it is there."""

    id: int | None
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

    @property
    def known_id(self) -> str:
        """fal's id. Raises ValueError for a row that fal gave none."""
        if self.request_id is None:
            raise ValueError(f"a request that is {self.state} has no id")
        return self.request_id

    @property
    def answer(self) -> Any:
        """The JSON of fal's response; None where there is none."""
        return json.loads(self.response) if self.response else None


class Journal:
    """The journal in a folder that exists: ``Journal(folder).find_request(request_id)``.

    Each call opens the file again, so a lost or replaced file is no obstacle.

    Args:
        folder: holds the journal's file; the file is made where it is missing.

    Raises:
        JournalError: any call may find that the file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._unwritten: dict[str, Entry] = {}  # newer than what the file holds, because writing it failed

    def find(self, fingerprint: str) -> Entry | None:
        """The latest submission of these inputs, as far as it is known anywhere."""
        if fingerprint in self._unwritten:
            return self._unwritten[fingerprint]
        row, kept = self._one("fingerprint = ? ORDER BY id DESC LIMIT 1", fingerprint), self._kept(fingerprint)
        if kept is None:
            return row
        if row is None or kept.created > row.created:
            return self._write(kept._replace(id=None))
        if kept.created == row.created and kept.request_id and row.request_id is None and row.state not in ENDED:
            return self.update(row, SUBMITTED, request_id=kept.request_id)
        return row

    def find_request(self, request_id: str) -> Entry | None:
        """The submission that fal knows under this id, if its result came."""
        return self._one(f"request_id = ? AND state IN ('{COMPLETED}', '{SAVED}') ORDER BY id DESC LIMIT 1", request_id)

    def begin(
        self,
        fingerprint: str,
        endpoint: str,
        cost_usd: float | None,
        request_id: str | None = None,
        limit: tuple[datetime, float] | None = None,
    ) -> Entry:
        """A new row: SUBMITTED with an id, else SUBMITTING.

        Args:
            fingerprint: hashes the inputs, as an `Order` has it.
            endpoint: names fal's endpoint.
            cost_usd: counts what fal will charge, at most; None where it is unknown.
            request_id: is fal's; None before fal gave one.
            limit: gives a time, and the USD that may be spent from then on, this submission included.

        Raises:
            Taken: another submission of these inputs is alive.
            OverLimit: the submission would cost more than the limit allows.
        """
        now = _now()
        state = SUBMITTED if request_id else SUBMITTING
        row = Entry(None, fingerprint, endpoint, state, request_id, cost_usd, now, now, None, (), None)
        keeping = False
        try:
            with self._writing() as database:
                if limit is not None:
                    spent = _spent(database, limit[0])
                    if not spent + (cost_usd or 0.0) <= limit[1] + 1e-9:  # so that NaN lets nothing pass
                        raise OverLimit(spent)
                row = _insert(database, row)
                keeping = True
                self._keep(row)
        except Taken:
            raise
        except JournalError:
            if keeping:
                self._let_go(row)
            raise
        return row

    def update(self, row: Entry, state: str, **columns: Any) -> Entry:
        """Set a row's state and other columns, and return the row. A row that was deleted comes back."""
        row = row._replace(**{**columns, "state": state, "updated": _now()})
        row = row._replace(files=tuple(row.files))
        return self._write(row)

    def uploaded(self, sha256: str) -> str | None:
        """Where a file of this content was uploaded to."""
        with self._reading() as database:
            found = database.execute("SELECT url FROM uploads WHERE sha256 = ?", (sha256,)).fetchone()
        return found[0] if found else None

    def keep_upload(self, sha256: str, url: str) -> None:
        """Remember where a file was uploaded to."""
        with self._writing() as database:
            database.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?)", (sha256, url, _now()))

    def _write(self, row: Entry) -> Entry:
        self._unwritten[row.fingerprint] = row
        if row.state in ENDED or row.state == SAVED:
            self._let_go(row)
        else:
            with suppress(OSError):  # then only the journal knows it, as before there were such files
                self._keep(row)
        with self._writing() as database:
            values = {**row._asdict(), "files": json.dumps(row.files)}
            names = ", ".join(f"{name} = :{name}" for name in Entry._fields[3:])
            same = "id = :id AND fingerprint = :fingerprint AND created = :created"
            if not database.execute(f"UPDATE requests SET {names} WHERE {same}", values).rowcount:
                row = _insert(database, row._replace(id=None))
        del self._unwritten[row.fingerprint]
        return row

    def _one(self, where: str, *values: Any) -> Entry | None:
        with self._reading() as database:
            found = database.execute(f"SELECT {_COLUMNS} FROM requests WHERE {where}", values).fetchone()
        return found and _row(found)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        _make_private(self.path)
        try:
            with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as database:
                _prepare(database)
                yield database
        except sqlite3.Error as error:
            raise JournalError(str(error)) from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException as error:
                if database.in_transaction:  # a full disk has ended it already
                    database.execute("ROLLBACK")
                if isinstance(error, sqlite3.IntegrityError) and str(error).startswith("UNIQUE"):
                    raise Taken(str(error)) from None
                if isinstance(error, OSError):
                    raise JournalError(error.strerror or type(error).__name__) from None
                raise

    def _file(self, fingerprint: str) -> Path | None:
        """The file of an open submission; None for one that this machine did not make."""
        if fingerprint.startswith(RECOVERED):
            return None
        return self.path.parent / OPEN / f"{fingerprint}.json"

    def _keep(self, row: Entry) -> None:
        file = self._file(row.fingerprint)
        if file is None:
            return
        file.parent.mkdir(mode=0o700, exist_ok=True)
        part = file.with_suffix(".part")
        with open(part, "w", encoding="utf-8", opener=_private) as stream:
            json.dump({**row._asdict(), "response": None, "files": []}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)

    def _let_go(self, row: Entry) -> None:
        file = self._file(row.fingerprint)
        if file is not None:
            with suppress(OSError):  # what stays is older than the journal's row, and so decides nothing
                file.unlink(missing_ok=True)

    def _kept(self, fingerprint: str) -> Entry | None:
        file = self._file(fingerprint)
        return None if file is None else _read_kept(file)


def saved(folder: Path, fingerprint: str) -> Entry | None:
    """The latest submission of these inputs, if its pictures are files. Reads only, also where nothing can be written.

    Args:
        folder: holds the journal; it may not exist yet.
        fingerprint: hashes the inputs, as an `Order` has it.

    Returns:
        the row; None where there is none, or where the journal cannot be read so. `Journal` then says why.
    """
    try:
        with closing(_read_only(folder / NAME)) as database:
            found = database.execute(
                f"SELECT {_COLUMNS} FROM requests WHERE fingerprint = ? ORDER BY id DESC LIMIT 1", (fingerprint,)
            ).fetchone()
    except sqlite3.Error:
        return None
    row = found and _row(found)
    return row if row and row.state == SAVED else None


def overview(folder: Path, session: datetime, now: datetime) -> dict[str, Any]:
    """Requests that were submitted and not collected, and what was spent. It only reads the journal.

    >>> overview(Path("no journal here"), datetime.now().astimezone(), datetime.now().astimezone())["open"]
    []

    Args:
        folder: holds the journal; it may not exist yet.
        session: says when this session began.
        now: gives the time with a zone; the day is that of this zone.

    Returns:
        ``open``: a list, newest first, of ``request_id`` (None where fal's answer was lost), ``state``, ``endpoint``,
        ``created``, ``age_s``, ``cost_usd`` (None where it is unknown) and ``error``. ``session_usd`` and ``day_usd``:
        what was submitted since, without what failed or was cancelled.

    Raises:
        JournalError: it cannot be read.
    """
    rows: list[Entry] = []
    spent = [0.0, 0.0]
    if (folder / NAME).is_file():
        try:
            with closing(_read_only(folder / NAME)) as database:
                columns = _COLUMNS.replace("response", "NULL")  # which may be large
                rows = [_row(found) for found in database.execute(f"SELECT {columns} FROM requests ORDER BY id DESC")]
                spent = [_spent(database, since) for since in (session, day_start(now))]
        except sqlite3.Error as error:
            raise JournalError(str(error)) from None
    return {
        "open": [_open_entry(row, now) for row in _open(folder, rows)],
        "session_usd": spent[0],
        "day_usd": spent[1],
    }


def as_text(found: dict[str, Any]) -> str:
    """The result of `overview` for people: the spending, and a line for each open request.

    >>> as_text({"open": [], "session_usd": 0.04, "day_usd": 0.04}).splitlines()[0][:5]
    'Spent'
    """
    lines = [
        f"Spent: ${found['session_usd']:.4f} in this session, ${found['day_usd']:.4f} today (submitted, without what "
        "failed or was cancelled)."
    ]
    if not found["open"]:
        return "\n".join([*lines, "No request is open: all that was submitted is collected or ended."])
    lines.append("Open requests: id, state, age, price")
    for entry in found["open"]:
        price = "price unknown" if entry["cost_usd"] is None else f"${entry['cost_usd']:.4f}"
        parts = [entry["request_id"] or "no id", _MEANING[entry["state"]], _age(entry["age_s"]), price]
        lines.append(", ".join(parts))
    lines.append(
        "To collect one, run Klein on fal with the same inputs and the same seed, or give its id as "
        "recover_request_id. fal lists its own at fal.ai/dashboard/requests."
    )
    return "\n".join(lines)


def day_start(now: datetime) -> datetime:
    """Midnight before a time with a zone."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can read, or make it so.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.name == "posix" and folder.stat().st_mode & 0o077:
        with suppress(OSError):  # a file system without modes
            folder.chmod(0o700)


def _open(folder: Path, rows: list[Entry]) -> list[Entry]:
    """Submissions that are alive and not saved: of the journal's rows, newest first, and of the files beside it."""
    latest: dict[str, str] = {}
    for row in rows:
        latest.setdefault(row.fingerprint, row.created)
    kept = [row for row in map(_read_kept, (folder / OPEN).glob("*.json")) if row is not None]
    unknown = [row for row in kept if row.created > latest.get(row.fingerprint, "")]
    collected = {row.request_id for row in rows if row.state == SAVED}
    found = [row for row in rows if row.state not in (*ENDED, SAVED) and row.request_id not in collected]
    return sorted([*unknown, *found], key=lambda row: row.created, reverse=True)


def _open_entry(row: Entry, now: datetime) -> dict[str, Any]:
    age = (now - datetime.fromisoformat(row.created)).total_seconds()
    return {
        "request_id": row.request_id,
        "state": row.state,
        "endpoint": row.endpoint,
        "created": row.created,
        "age_s": max(age, 0.0),
        "cost_usd": row.cost_usd,
        "error": row.error,
    }


def _age(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} old"
    return f"{seconds:.0f} seconds old"


def _spent(database: sqlite3.Connection, since: datetime) -> float:
    """USD of what was submitted since a time and may be charged."""
    [spent] = database.execute(
        f"SELECT TOTAL(cost_usd) FROM requests WHERE created >= ? AND state NOT IN {UNCHARGED!r}", (_text(since),)
    ).fetchone()
    return float(spent)


def _prepare(database: sqlite3.Connection) -> None:
    """Make the tables; those of a journal from before the first version get its checks."""
    if database.execute("PRAGMA user_version").fetchone()[0] == _VERSION:
        return
    before = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone()
    database.executescript(f"BEGIN IMMEDIATE; {_FROM_BEFORE if before else _TABLES} COMMIT;")


def _insert(database: sqlite3.Connection, row: Entry) -> Entry:
    marks = ", ".join(f":{name}" for name in Entry._fields)
    values = {**row._asdict(), "files": json.dumps(row.files)}
    return row._replace(id=database.execute(f"INSERT INTO requests ({_COLUMNS}) VALUES ({marks})", values).lastrowid)


def _row(found: tuple[Any, ...]) -> Entry:
    return Entry(*found)._replace(files=tuple(json.loads(found[Entry._fields.index("files")])))


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30, isolation_level=None)


def _read_kept(file: Path) -> Entry | None:
    """The row in the file of an open submission; None where there is no file.

    Raises:
        JournalError: it cannot be read.
    """
    try:
        return Entry(**json.loads(file.read_text(encoding="utf-8")))._replace(files=())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise JournalError(
            f"{file}, which keeps the id of an open request, cannot be read: {type(error).__name__}. Look for that "
            "request at fal.ai/dashboard/requests before you delete the file"
        ) from None


def _make_private(path: Path) -> None:
    """Make the file, or make it so, that only its owner can read it."""
    with suppress(OSError):  # what cannot be made or changed, SQLite refuses in its own words, or need not write
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        if os.name == "posix" and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _now() -> str:
    return _text(datetime.now(timezone.utc))


def _text(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds")
