"""The journal when it fails, is deleted or cannot be written, and what it says of open requests and spending."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import stat
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from fal_runs import QUICK, Interrupt, Machine, fal_fixture, machine_fixture, order  # noqa: F401 - fixtures
from fal_server import answer, drop, stall
from klein_cns.remote import journal as journals
from klein_cns.remote.errors import JournalError, OverLimit, RemoteError, Taken
from klein_cns.remote.journal import Journal, as_text, overview

NAME = journals.NAME
NOW = datetime(2026, 3, 5, 14, 0, tzinfo=timezone(timedelta(hours=2)))


def timed_out(machine):
    """A run that fal took and that nobody waits for any more."""
    with pytest.raises(RemoteError, match="still"):
        machine.run(waits=replace(QUICK, queue=0.1, running=0.1))


def change(machine, sql):
    database = sqlite3.connect(machine.folder / NAME, isolation_level=None)
    database.execute(sql)
    database.close()


# What becomes of a journal --------------------------------------------------------------------------------------


def deleted(path, _):
    path.unlink()


def emptied(path, _):
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("DELETE FROM requests")
    database.close()


def truncated(path, _):
    path.write_bytes(b"")


def replaced(path, before):
    shutil.copy(before, path)


LOSSES = [deleted, emptied, truncated, replaced]


def journal_of_another_day(machine, tmp_path):
    """A copy of a journal that holds another request."""
    machine.run(order(seed=99))
    shutil.copy(machine.folder / NAME, tmp_path / "before.sqlite")
    return tmp_path / "before.sqlite"


@pytest.mark.parametrize("lose", LOSSES)
def test_a_journal_lost_under_way_comes_back_with_the_run(fal, machine, tmp_path, lose):
    before, lost = journal_of_another_day(machine, tmp_path), []
    fal.queued = 5

    def check():
        if any("position" in line for line in machine.said) and not lost:
            lost.append(lose(machine.folder / NAME, before))

    machine.said.clear()
    found = machine.run(check=check)
    assert lost and fal.posts == 2 and machine.state() == "saved"
    assert machine.run().request_id == found.request_id and machine.run().cost_usd == 0 and fal.posts == 2


@pytest.mark.parametrize("lose", LOSSES)
def test_a_journal_lost_between_two_runs_buys_nothing_again(fal, machine, tmp_path, lose):
    before = journal_of_another_day(machine, tmp_path)
    fal.queued = 10**6
    timed_out(machine)
    lose(machine.folder / NAME, before)
    fal.queued = 1
    found = machine.run()
    assert fal.posts == 2 and found.cost_usd == 0 and found.request_id == list(fal.requests)[-1]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_submission_stays_one_without_the_journal(fal, machine, tmp_path, lose):
    before = journal_of_another_day(machine, tmp_path)
    fal.fail(submit=drop(accept=True))
    for _ in range(2):
        with pytest.raises(RemoteError, match="Whether fal took it is unknown"):
            machine.run()
        lose(machine.folder / NAME, before)
    assert fal.posts == 2
    assert machine.run(resubmit_lost=True).images and fal.posts == 3


def test_what_has_ended_or_is_saved_leaves_no_file_beside_the_journal(fal, machine):
    kept = machine.folder / journals.OPEN
    machine.run()
    fal.fail(submit=answer(400, {"detail": "no"}))
    with pytest.raises(RemoteError):
        machine.run(order(seed=6))
    assert list(kept.iterdir()) == []
    fal.queued, waiting = 10**6, order(seed=7)
    with pytest.raises(RemoteError, match="still waits"):
        machine.run(waiting, waits=replace(QUICK, queue=0.1))
    assert [path.stem for path in kept.iterdir()] == [waiting.fingerprint]


def test_a_file_beside_the_journal_that_cannot_be_read_is_no_permission_to_buy(fal, machine):
    fal.queued = 10**6
    timed_out(machine)
    [kept] = (machine.folder / journals.OPEN).iterdir()
    kept.write_text("{ half")
    (machine.folder / NAME).unlink()
    with pytest.raises(RemoteError, match="keeps the id of an open request, cannot be read.*dashboard/requests"):
        machine.run()
    assert fal.posts == 1


# Full disks, read-only folders, locks -----------------------------------------------------------------------------


class Full(sqlite3.Connection):
    """A disk that is full at a statement; SQLite then ends the transaction itself."""

    at = ""

    def execute(self, sql, *more):
        if self.at and sql.startswith(self.at):
            if self.in_transaction:
                super().execute("ROLLBACK")
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *more)


@pytest.fixture
def full(monkeypatch):
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **options: real(*a, **options, factory=Full))
    monkeypatch.setattr(Full, "at", "")
    return lambda at: monkeypatch.setattr(Full, "at", at)


@pytest.mark.parametrize("at", ["INSERT", "COMMIT", "BEGIN"])
def test_a_full_disk_is_called_one_and_nothing_is_submitted(fal, machine, full, at):
    machine.run(order(seed=1))
    full(at)
    with pytest.raises(RemoteError, match="database or disk is full.*nothing was submitted. Free some space"):
        machine.run()
    assert fal.posts == 1 and not list((machine.folder / journals.OPEN).iterdir())
    full("")
    assert machine.run().images and fal.posts == 2


@pytest.mark.parametrize("at", ["UPDATE requests", "COMMIT"])
def test_a_disk_that_fills_up_once_fal_has_the_request_names_its_id(fal, machine, full, at):
    machine.run(order(seed=1))

    def fill(handler, proceed):
        found = proceed()
        full(at)
        handler.reply(*found)

    fal.fail(submit=fill)
    with pytest.raises(RemoteError, match="fal took the request as [0-9a-f-]{36}, but .*disk is full") as error:
        machine.run()
    assert list(fal.requests)[-1] in str(error.value)
    full("")
    assert machine.run().request_id == list(fal.requests)[-1] and fal.posts == 2  # the file beside it kept the id


@pytest.mark.parametrize("beside", [True, False], ids=["written beside it", "written nowhere"])
def test_an_interrupt_cancels_a_request_that_could_not_be_journaled(fal, machine, full, beside):
    machine.run(order(seed=1))
    fal.queued = 10**6

    def fill(handler, proceed):
        found = proceed()
        full("COMMIT")
        if not beside:
            folder = machine.folder / journals.OPEN
            shutil.rmtree(folder)
            folder.write_text("a file where the folder should be")
        fal.reached["submit"].set()
        time.sleep(0.4)
        handler.reply(*found)

    fal.reached["submit"].clear()
    fal.fail(submit=lambda handler, proceed: (fal.reached["submit"].clear(), fill(handler, proceed)))

    def check():
        if fal.reached["submit"].is_set() and Full.at:
            raise Interrupt

    with pytest.raises(Interrupt):
        machine.run(check=check)
    assert [request["cancelled"] for request in fal.requests.values()] == [False, True]


def test_a_cancellation_that_cannot_be_journaled_is_still_asked_for(fal, machine, full):
    machine.run(order(seed=1))
    fal.queued = 10**6
    fal.reached["status"].clear()

    def check():
        if fal.reached["status"].is_set():
            full("BEGIN")
            raise Interrupt

    with pytest.raises(Interrupt):
        machine.run(check=check)
    assert [request["cancelled"] for request in fal.requests.values()] == [False, True]


@pytest.fixture
def read_only(monkeypatch):
    """A disk that cannot be written: as on a read-only mount, also for root."""

    def begin():
        real = sqlite3.connect

        def connect(path, *more, **options):
            path = str(path) if str(path).startswith("file:") else f"file:{path}?mode=ro"
            return real(path, *more, **{**options, "uri": True})

        monkeypatch.setattr(sqlite3, "connect", connect)
        monkeypatch.setattr(journals, "_make_private", lambda path: None)

    return begin


def test_a_read_only_journal_serves_what_is_saved_and_refuses_the_rest(fal, machine, read_only):
    first = machine.run()
    read_only()
    for name in ("locks", "open"):  # nor can a lock be taken
        shutil.rmtree(machine.folder / name)
        (machine.folder / name).write_text("")
    again = machine.run()
    assert again.request_id == first.request_id and again.cost_usd == 0
    with pytest.raises(RemoteError, match="cannot be used .*nothing is submitted without it"):
        machine.run(order(seed=6))
    for name in ("locks", "open"):
        (machine.folder / name).unlink()
        (machine.folder / name).mkdir()
    with pytest.raises(RemoteError, match="readonly database.*nothing was submitted. .*let this user write there"):
        machine.run(order(seed=6))
    assert fal.posts == 1


def test_a_lock_that_cannot_be_taken_is_a_sentence(fal, machine):
    first, other = machine.run(), order(seed=6)
    for ordered in (order(), other):
        lock = machine.folder / "locks" / f"inputs-{ordered.fingerprint[-3:]}"
        lock.unlink(missing_ok=True)
        lock.mkdir()
    assert machine.run().request_id == first.request_id
    with pytest.raises(RemoteError, match="inputs-.* cannot be locked .*nothing was submitted"):
        machine.run(other)
    assert fal.posts == 1


def test_a_lock_that_the_file_system_does_not_have_is_a_sentence(fal, machine, monkeypatch):
    import filelock

    def acquire(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(RemoteError, match="cannot be locked .FileSystem does not .*on a local disk"):
        machine.run()
    assert fal.posts == 0


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX")
@pytest.mark.parametrize("there", [True, False], ids=["made by the user", "made here"])
def test_folder_and_journal_are_readable_by_their_owner_alone(fal, machine, there):
    before = os.umask(0)
    try:
        if there:
            machine.folder.mkdir(parents=True, mode=0o755)
            (machine.folder / NAME).touch(mode=0o644)
        fal.queued = 10**6
        timed_out(machine)
    finally:
        os.umask(before)
    for path in (machine.folder, *machine.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir() or path.suffix in (".sqlite", ".json"):
            assert mode == (0o700 if path.is_dir() else 0o600) or path.name == "locks", (path, oct(mode))


# The journal itself -----------------------------------------------------------------------------------------------


def test_a_row_that_fal_knows_has_an_id(tmp_path):
    journal = Journal(tmp_path)
    row = journal.begin("a", "e", 0.04)
    for state in ("submitted", "cancelling", "completed", "saved"):
        database = sqlite3.connect(tmp_path / NAME)
        with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
            database.execute("UPDATE requests SET state = ? WHERE id = ?", (state, row.id))
        database.close()
        with pytest.raises(JournalError, match="CHECK"):
            journal.update(row, state)
    assert Journal(tmp_path).find("a").state == "submitting"


def test_one_submission_of_the_same_inputs_is_alive(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    row = first.begin("a", "e", 0.04)
    with pytest.raises(Taken):
        second.begin("a", "e", 0.04)
    row = first.update(row, "submitted", request_id="id")
    with pytest.raises(Taken):
        second.begin("a", "e", 0.04, request_id="other")
    assert second.find("a") == row  # what was refused has changed nothing
    first.update(row, "failed")
    assert second.begin("a", "e", 0.04, request_id="other").state == "submitted"


def test_a_journal_of_an_older_version_gets_the_checks(tmp_path):
    database = sqlite3.connect(tmp_path / NAME)
    database.executescript("""
        CREATE TABLE requests (
            id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, endpoint TEXT NOT NULL, state TEXT NOT NULL,
            request_id TEXT, cost_usd REAL, created TEXT NOT NULL, updated TEXT NOT NULL, response TEXT,
            files TEXT NOT NULL, error TEXT
        );
        CREATE UNIQUE INDEX alive ON requests (fingerprint) WHERE state NOT IN ('cancelled', 'failed', 'replaced');
        CREATE TABLE uploads (sha256 TEXT PRIMARY KEY, url TEXT NOT NULL, created TEXT NOT NULL);
        INSERT INTO requests VALUES (3, 'a', 'e', 'submitted', NULL, 0.04, '2026', '2026', NULL, '[]', NULL);
        INSERT INTO requests VALUES (5, 'b', 'e', 'saved', 'id', 0.04, '2026', '2026', '{}', '["x.png"]', NULL);
        INSERT INTO uploads VALUES ('sha', 'https://a/b', '2026');
    """)
    database.close()
    journal = Journal(tmp_path)
    assert (journal.find("a").state, journal.find("b").files) == ("lost", ("x.png",))
    assert journal.uploaded("sha") == "https://a/b" and journal.find("b").id == 5
    with pytest.raises(JournalError, match="CHECK"):
        journal.update(journal.find("a"), "saved")
    with pytest.raises(Taken):
        Journal(tmp_path).begin("a", "e", None)


# Open requests and spending ---------------------------------------------------------------------------------------


def at(monkeypatch, moment):
    monkeypatch.setattr(journals, "_now", lambda: journals._text(moment))


def test_the_overview_lists_what_is_open_and_counts_what_was_spent(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    session = NOW - timedelta(hours=1)
    steps = [  # (age in hours, price, state)
        (30, 0.04, "submitted"),
        (20, 0.01, "saved"),
        (13, 0.02, "lost"),
        (5, 0.08, "completed"),
        (3, 0.16, "failed"),
        (2, 0.32, "cancelled"),
        (0.5, 0.64, "saved"),
        (0.25, 1.28, "cancelling"),
        (0.1, 2.56, "replaced"),
        (0.05, 5.12, "submitting"),
    ]
    for number, (hours, price, state) in enumerate(steps):
        at(monkeypatch, NOW - timedelta(hours=hours))
        row = journal.begin(f"f{number}", "e", price)
        if state != "submitting":
            journal.update(row, state, request_id=None if state == "lost" else f"id{number}")
    at(monkeypatch, NOW - timedelta(minutes=1))
    journal.begin("recovered:x", "e", None, request_id="x")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    found = overview(tmp_path, session, NOW)
    assert json.loads(json.dumps(found)) == found  # plain data
    assert [(entry["request_id"], entry["state"], entry["cost_usd"]) for entry in found["open"]] == [
        ("x", "submitted", None),
        (None, "submitting", 5.12),
        ("id7", "cancelling", 1.28),
        ("id3", "completed", 0.08),
        (None, "lost", 0.02),
        ("id0", "submitted", 0.04),
    ]
    assert [round(entry["age_s"] / 3600, 2) for entry in found["open"]] == [0.02, 0.05, 0.25, 5, 13, 30]
    assert found["session_usd"] == pytest.approx(0.64 + 1.28 + 2.56 + 5.12)
    assert found["day_usd"] == pytest.approx(0.02 + 0.08 + 0.64 + 1.28 + 2.56 + 5.12)  # midnight is 14 hours ago there
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before  # reads only
    text = as_text(found)
    for part in (
        "$9.6000 in this session, $9.7000 today",
        "id7, to be cancelled, not confirmed, 15 minutes old, $1.2800",
        "no id, submitted, fal's answer was lost, 13 hours old, $0.0200",
        "x, submitted",
        "price unknown",
        "recover_request_id",
    ):
        assert part in text, text


def test_the_overview_knows_what_only_the_file_beside_the_journal_knows(fal, machine):
    fal.queued = 10**6
    timed_out(machine)
    (machine.folder / NAME).unlink()
    [entry] = overview(machine.folder, NOW, datetime.now(timezone.utc))["open"]
    assert (entry["request_id"], entry["cost_usd"]) == (next(iter(fal.requests)), pytest.approx(0.04))
    assert not (machine.folder / NAME).exists()


def test_the_overview_of_nothing_and_of_a_damaged_journal(tmp_path):
    nothing = overview(tmp_path / "nowhere", NOW, NOW)
    assert nothing == {"open": [], "session_usd": 0.0, "day_usd": 0.0} and "No request is open" in as_text(nothing)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / NAME).write_bytes(b"this is not a database" * 100)
    with pytest.raises(JournalError, match="not a database"):
        overview(tmp_path, NOW, NOW)


def test_what_was_collected_under_its_id_is_not_open(fal, machine):
    fal.queued = 10**6
    timed_out(machine)
    fal.queued = 1
    machine.run(recover_request_id=next(iter(fal.requests)))
    assert overview(machine.folder, NOW, datetime.now(timezone.utc))["open"] == []


def test_the_limit_of_a_day_refuses_before_anything_leaves(fal, machine):
    machine.run(order(seed=1), max_usd_a_day=0.1)
    machine.run(order(seed=2), max_usd_a_day=0.1)
    for limit in (0.1, float("nan"), -1.0):
        with pytest.raises(RemoteError, match="costs .0.0400, and .0.0800 were spent today: .*nothing was submitted"):
            machine.run(order(seed=3), max_usd_a_day=limit)
    assert fal.posts == 2 and machine.run(order(seed=1), max_usd_a_day=0.1).cost_usd == 0  # a repeat costs nothing
    assert machine.run(order(seed=3), max_usd_a_day=0.12).images and machine.run(order(seed=4)).images
    change(machine, "UPDATE requests SET created = '2020-01-01T00:00:00.000+00:00'")
    assert machine.run(order(seed=5), max_usd_a_day=0.1).images and fal.posts == 5


def test_the_limit_of_a_day_holds_for_two_at_once(tmp_path, monkeypatch):
    """It is counted in the transaction that permits a submission."""
    midnight = NOW.replace(hour=0)
    at(monkeypatch, NOW)
    Journal(tmp_path).begin("a", "e", 0.06, limit=(midnight, 0.1))
    with pytest.raises(OverLimit) as error:
        Journal(tmp_path).begin("b", "e", 0.06, limit=(midnight, 0.1))
    assert error.value.spent == pytest.approx(0.06) and Journal(tmp_path).find("b") is None
    Journal(tmp_path).begin("c", "e", 0.04, limit=(midnight, 0.1))


def test_what_is_open_is_found_in_every_state_that_a_run_leaves(fal, machine):
    """Whatever a run ends with, what fal has and nobody collected is in the list, once."""
    ends = [
        ({"submit": drop(accept=True)}, {}),
        ({"status": itertools.repeat(drop())}, {"silence": 0.2}),
        ({"result": itertools.repeat(answer(404))}, {}),
        ({"file": itertools.repeat(answer(404))}, {}),
        ({"submit": stall(0.6)}, {"submit": 0.2}),
    ]
    for number, (faults, waits) in enumerate(ends):
        fal.heal()
        fal.fail(**faults)
        with pytest.raises(RemoteError):
            machine.run(order(seed=number), waits=replace(QUICK, **waits))
        listed = overview(machine.folder, NOW, datetime.now(timezone.utc))["open"]
        assert len(listed) == number + 1
        assert listed[0]["cost_usd"] == pytest.approx(0.04)
