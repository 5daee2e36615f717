"""Interrupts, kill -9, two runs at once, repeats and recovery: what is paid for is paid for once, and never lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from fal_runs import QUICK, Interrupt, Machine, fal_fixture, machine_fixture, order  # noqa: F401 - fixtures
from fal_server import KEY, answer, drop, png, stall
from klein_cns.remote.errors import RemoteError
from klein_cns.remote.journal import NAME as JOURNAL
from klein_cns.remote.journal import overview

CHILD = Path(__file__).with_name("fal_child.py")
POINTS = ("submit", "status", "result", "file")


def start(base, fal, *more):
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, CHILD, base, fal.url, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.communicate()


def interrupted(machine, fal, point, **options):
    """Run until the server is reached at ``point``, then interrupt; the seconds that it took to rise."""
    since = []

    def check():
        if fal.reached[point].is_set():
            since.append(time.monotonic())
            raise Interrupt

    with pytest.raises(Interrupt):
        machine.run(check=check, **options)
    assert len(since) == 1
    return time.monotonic() - since[0]


def test_the_place_in_the_queue_is_said_in_words(fal, machine):
    fal.queued = 2
    machine.run()
    places = [line.rpartition(", ")[0] for line in machine.said if "queue" in line]
    assert places == ["in fal's queue, position 1", "next in fal's queue"]


def test_interrupt_in_the_queue_cancels_and_the_next_run_submits_anew(fal, machine):
    fal.queued = 10**6
    interrupted(machine, fal, "status")
    assert [request["cancelled"] for request in fal.requests.values()] == [True]
    assert machine.state() == "cancelled" and machine.said[-1] == "cancelled at fal"
    fal.queued = 1
    assert machine.run().images and len(fal.requests) == 2


def test_interrupt_in_the_middle_of_a_submission_waits_for_the_id_and_cancels(fal, machine):
    fal.fail(submit=stall(0.3))
    assert interrupted(machine, fal, "submit") < 10
    assert [request["cancelled"] for request in fal.requests.values()] == [True] and machine.state() == "cancelled"


def test_interrupt_while_the_answer_to_a_submission_does_not_come_is_recorded_as_lost(fal, machine):
    fal.fail(submit=stall(60.0))
    assert interrupted(machine, fal, "submit", waits=replace(QUICK, grace=0.4)) < 10
    assert machine.state() == "lost"
    with pytest.raises(RemoteError, match="interrupted before fal's answer came.*resubmit_lost"):
        machine.run()
    assert fal.posts == 1
    assert machine.run(resubmit_lost=True).images and fal.posts == 2


def test_interrupt_of_a_submission_whose_answer_is_lost_says_so(fal, machine):
    def lose(handler, proceed):
        proceed()
        time.sleep(0.4)
        handler.hang_up()

    fal.fail(submit=lose)
    interrupted(machine, fal, "submit")
    assert machine.state() == "lost" and "Whether fal took it is unknown" in machine.said[-1]


def test_interrupt_before_the_submission_leaves_nothing(fal, machine):
    def check():
        raise Interrupt

    with pytest.raises(Interrupt):
        machine.run(check=check)
    assert fal.posts == 0 and machine.state() is None


def test_interrupt_while_trying_again_submits_nothing_more(fal, machine):
    fal.fail(submit=itertools.repeat(answer(429, Retry_After="1")))
    interrupted(machine, fal, "submit")
    assert not fal.requests and machine.state() == "failed" and fal.posts == 1


def test_interrupt_of_a_completed_request_fetches_it(fal, machine):
    fal.fail(result=stall(0.3))
    interrupted(machine, fal, "result")
    assert machine.state() == "saved" and "its result is kept" in machine.said[-1]
    assert machine.run().cost_usd == 0 and len(fal.requests) == 1


def test_interrupt_of_a_completed_request_whose_result_does_not_come_is_no_cancellation(fal, machine):
    fal.fail(result=itertools.repeat(answer(404)))
    interrupted(machine, fal, "result")
    assert machine.state() == "submitted" and "not confirmed" in machine.said[-1]
    fal.heal()
    assert machine.run().images and len(fal.requests) == 1


def test_interrupt_of_a_request_that_fails_meanwhile_is_said(fal, machine):
    fal.fail(result=itertools.repeat(answer(422, {"detail": []})), status=stall(0.3))
    interrupted(machine, fal, "status")
    assert machine.state() in ("cancelled", "failed") and "not confirmed" not in machine.said[-1]


def test_interrupt_of_a_completed_request_whose_file_is_slow_is_no_doubt(fal, machine):
    fal.fail(result=stall(0.3), file=stall(3.0))
    interrupted(machine, fal, "result", waits=replace(QUICK, grace=1.0))
    assert machine.state() == "completed" and machine.said[-1].startswith("fal had completed the request")
    assert machine.run().images and fal.posts == 1


def test_interrupt_while_a_file_comes_keeps_the_request(fal, machine):
    fal.fail(file=stall(0.4))
    interrupted(machine, fal, "file")
    assert machine.state() == "completed"
    assert machine.run().images and len(fal.requests) == 1


@pytest.mark.parametrize("fault", [drop(), answer(500)], ids=["no network", "500"])
def test_a_cancellation_that_fal_does_not_take_is_said_and_the_next_run_collects(fal, machine, fault):
    fal.queued = 10**6
    fal.fail(cancel=itertools.repeat(fault))
    interrupted(machine, fal, "status", waits=replace(QUICK, grace=1.0))
    assert machine.state() == "submitted" and "may go on and be charged" in machine.said[-1], machine.said
    fal.heal()
    fal.queued = 1
    assert machine.run().images and len(fal.requests) == 1


def test_a_cancellation_without_confirmation_is_not_taken_for_one(fal, machine):
    """fal says that it will cancel, and the job goes on: the next run must not submit a second one."""
    fal.queued = 10**6
    fal.fail(cancel=answer(202, {"status": "CANCELLATION_REQUESTED"}))
    interrupted(machine, fal, "status", waits=replace(QUICK, grace=0.3))
    assert machine.state() == "cancelling" and "not confirmed: no confirmation within 0.3 s. It" in machine.said[-1]
    fal.queued = 1
    assert machine.run().images and len(fal.requests) == 1


def test_a_cancellation_confirmed_later_lets_the_next_run_submit(fal, machine):
    fal.queued = 10**6
    fal.fail(cancel=answer(202, {"status": "CANCELLATION_REQUESTED"}))
    interrupted(machine, fal, "status", waits=replace(QUICK, grace=0.3))
    fal.queued = 1
    next(iter(fal.requests.values()))["cancelled"] = True
    assert machine.run().images and len(fal.requests) == 2
    assert [row["state"] for row in machine.rows()] == ["cancelled", "saved"]


@pytest.mark.parametrize("fault", [answer(502, b"<html>"), answer(404)], ids=["502 for long", "404"])
def test_a_result_that_does_not_come_confirms_no_cancellation(fal, machine, fault):
    """fal goes on in spite of the cancellation and completes; only its own word ends the request."""
    fal.queued = 10**6
    fal.fail(cancel=answer(202, {"status": "CANCELLATION_REQUESTED"}))
    interrupted(machine, fal, "status", waits=replace(QUICK, grace=0.3))
    fal.queued = 1
    fal.fail(result=itertools.repeat(fault))
    with pytest.raises(RemoteError, match="resubmit_lost"):
        machine.run(waits=replace(QUICK, silence=0.3))
    assert fal.posts == 1 and machine.state() == "cancelling"
    fal.heal()
    assert machine.run().images and fal.posts == 1


def test_interrupt_before_fal_knows_the_id(fal, machine):
    """Unknown is not cancelled: it is asked again, and what stays unknown is collected by the next run."""
    fal.queued = 10**6
    fal.fail(cancel=answer(404), status=answer(404))
    interrupted(machine, fal, "status")
    assert [request["cancelled"] for request in fal.requests.values()] == [True] and machine.state() == "cancelled"

    fal.reached["status"].clear()
    fal.fail(cancel=itertools.repeat(answer(404)), status=itertools.repeat(answer(404)))
    interrupted(machine, fal, "status")
    assert machine.state() == "submitted" and "may go on and be charged" in machine.said[-1]
    fal.heal()
    fal.queued = 1
    assert machine.run().images and fal.posts == 2


@pytest.mark.parametrize("broken", ["file", "response", "unknown"])
def test_resubmit_lost_buys_once_a_run(fal, machine, broken):
    """What this run submitted it never gives up for another submission, however long a fault lasts."""
    if broken == "file":
        fal.fail(file=itertools.repeat(answer(403)))
    elif broken == "response":
        fal.respond = lambda response: {**response, "images": []}
    else:
        fal.fail(status=itertools.repeat(answer(404)))
    until = time.monotonic() + 2

    def check():
        assert time.monotonic() < until, f"{fal.posts} submissions"

    for posts in (1, 2):
        with pytest.raises(RemoteError, match="the next run submits it again"):
            machine.run(check=check, resubmit_lost=True)
        assert fal.posts == posts


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("taken", [True, False], ids=["cancelled", "not yet asked"])
def test_kill_while_cancelling(fal, machine, tmp_path, taken):
    """The next run submits again only if fal did cancel."""
    fal.queued = 10**6
    fal.fail(cancel=stall(60, accept=taken))
    child = start(tmp_path, fal, "interrupt")
    assert fal.reached["cancel"].wait(60)
    time.sleep(0.1)
    kill(child)
    assert machine.state() == "cancelling"
    fal.heal()
    fal.queued = 1
    assert machine.run().images
    assert len(fal.requests) == (2 if taken else 1)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("point", ["before fal took it", *POINTS])
def test_kill_at_each_state(fal, machine, tmp_path, point):
    """The next run collects the request, or says that its fate is unknown. It never submits a second one."""
    at = "submit" if point == "before fal took it" else point
    fal.fail(**{at: stall(1.0, accept=point != "before fal took it")})
    child = start(tmp_path, fal)
    assert fal.reached[at].wait(60)
    time.sleep(0.1)
    kill(child)
    states = {"submit": "submitting", "status": "submitted", "result": "submitted", "file": "completed"}
    assert machine.state() == states[at]
    fal.heal()
    time.sleep(1.1)  # what the server was about to do, it does
    if at == "submit":
        with pytest.raises(RemoteError, match="the machine stopped while the submission was under way.*resubmit_lost"):
            machine.run()
    else:
        assert machine.run().images
    assert len(fal.requests) == fal.posts == 1


def test_ending_the_program_does_not_wait_for_fal(fal, machine, tmp_path):
    fal.queued = 10**6
    child = start(tmp_path, fal, "background")
    assert fal.reached["status"].wait(60)
    assert child.wait(60) == 0
    child.communicate()
    fal.queued = 1
    assert machine.run().images and len(fal.requests) == 1


def test_two_processes_at_once_submit_once(fal, tmp_path):
    fal.queued = 20
    children = [start(tmp_path, fal) for _ in range(3)]
    found = [child.communicate(timeout=120) for child in children]
    assert [out.decode().strip() for out, _ in found] == ["1"] * 3, found
    assert fal.posts == len(fal.requests) == 1


def test_the_row_alone_keeps_a_second_submission_away(fal, machine, monkeypatch):
    """Without the lock of the file system (some network drives have none) the journal's index still stands."""

    @contextlib.asynccontextmanager
    async def nobody(*_):
        yield

    monkeypatch.setattr("klein_cns.remote.run._alone", nobody)
    fal.fail(submit=stall(0.3))
    outcomes = []

    def one():
        try:
            outcomes.append(len(machine.run().images))
        except RemoteError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fal.posts == 1, outcomes
    assert machine.run().images and fal.posts == 1


def test_a_second_run_waits_and_its_interrupt_cancels_nothing(fal, machine):
    fal.queued = 40
    first = []
    thread = threading.Thread(target=lambda: first.append(machine.run()))
    thread.start()
    assert fal.reached["status"].wait(10)

    def check():
        if any("waiting for that run" in line for line in machine.said):
            raise Interrupt

    with pytest.raises(Interrupt):
        machine.run(check=check)
    thread.join()
    assert first[0].images and [request["cancelled"] for request in fal.requests.values()] == [False]


def test_a_repeat_costs_nothing_and_each_changed_input_does(fal, machine):
    first = machine.run(order())
    assert first.cost_usd == pytest.approx(0.04)
    seen = len(fal.seen)
    again = machine.run(order())
    assert again.cost_usd == 0 and again.request_id == first.request_id and len(fal.seen) == seen
    changes = (
        {"seed": 6},
        {"prompt": "another one"},
        {"guidance_scale": 4.0},
        {"num_images": 2},
        {"output_format": "webp"},
        {"image_size": (512, 640)},
        {"pictures": 2},
        {"pictures": 0},
        {"cns_s_churn": 0.25},
        {"loras": [("owner/name", 0.5)]},
        {"loras": [("owner/name", 0.6)]},
    )
    for i, change in enumerate(changes):
        machine.run(order(**change))
        assert len(fal.requests) == i + 2, change


def test_results_are_files_before_anything_decodes_them(fal, machine, monkeypatch):
    def no_decoding(*_, **__):
        raise AssertionError("decoded before it was a file")

    monkeypatch.setattr("klein_cns.remote.results.decode", no_decoding)
    with pytest.raises(AssertionError):
        machine.run()
    [file] = machine.results.iterdir()
    assert file.read_bytes() == fal.picture and machine.state() == "saved"


def test_a_deleted_file_is_fetched_again_and_an_expired_one_is_said(fal, machine):
    first = machine.run()
    first.files[0].unlink()
    assert machine.run().images and len(fal.requests) == 1
    first.files[0].unlink()
    fal.fail(file=itertools.repeat(answer(404)))
    with pytest.raises(RemoteError, match="file is gone from fal .*resubmit_lost"):
        machine.run()
    assert len(fal.requests) == 1
    fal.heal()
    [expired] = fal.requests

    def gone(handler, proceed):
        handler.reply(*((404, {}, {}) if expired in handler.path else proceed()))

    fal.fail(file=itertools.repeat(gone))
    assert machine.run(resubmit_lost=True).images and len(fal.requests) == 2
    assert machine.run(resubmit_lost=True).cost_usd == 0 and len(fal.requests) == 2  # nothing is lost any more


@pytest.mark.parametrize(
    "faults",
    [
        {"file": [answer(404)] * 3},
        {"file": [answer(403), answer(503), drop()]},
        {"result": [answer(404)] * 6},
        {"result": [answer(200, {"message": "x"})] * 6},
        {"result": [answer(500, {}, X_Fal_Error_Type="internal_error")]},
        {"status": [answer(404)] * 6},
        {"status": [answer(401)] * 2},
    ],
    ids=["file 404", "file 403 and more", "result 404", "no pictures", "500 with a type", "status 404", "401"],
)
def test_resubmit_lost_does_not_buy_what_the_next_look_brings(fal, machine, faults):
    """The earlier run knew the id; whatever stood in the way of its result, the request may still be collectable."""
    fal.fail(status=itertools.repeat(drop()))
    with pytest.raises(RemoteError, match="no usable answer"):
        machine.run(waits=replace(QUICK, silence=0.2))
    fal.heal()
    fal.fail(**faults)
    assert machine.run(resubmit_lost=True, waits=replace(QUICK, gone=1.0)).images and fal.posts == 1


@pytest.mark.parametrize(
    "faults",
    [
        {"result": answer(502, b"<html>")},
        {"result": drop()},
        {"status": answer(500)},
        {"status": answer(401)},
        {"result": answer(200, b"<html>")},
    ],
    ids=["502", "dropped", "500 to polls", "401", "no JSON"],
)
def test_resubmit_lost_does_not_buy_what_fal_may_still_have(fal, machine, faults):
    [(point, fault)] = faults.items()
    fal.fail(**{point: itertools.repeat(fault)})
    for _ in range(3):
        with pytest.raises(RemoteError, match="Run again with the same inputs and the same seed"):
            machine.run(resubmit_lost=True, waits=replace(QUICK, silence=0.3))
    assert fal.posts == 1
    fal.heal()
    assert machine.run(resubmit_lost=True).images and fal.posts == 1


def test_before_it_buys_again_resubmit_lost_asks_fal_for_the_result_anew(fal, machine):
    """The addresses of the first answer have expired; the second answer has others."""
    machine.run().files[0].unlink()

    def only_new(handler, proceed):
        handler.reply(*(proceed() if "new" in handler.path else (403, {}, {})))

    fal.fail(file=itertools.repeat(only_new))
    fal.respond = lambda response: {**response, "images": [{"url": f"{fal.url}/files/new.png"}]}
    assert machine.run(resubmit_lost=True).images and fal.posts == 1


def test_one_picture_that_is_gone_beside_one_that_is_late_is_not_bought_again(fal, machine):
    def half(handler, proceed):
        handler.reply(*((404, {}, {}) if "/0.png" in handler.path else (503, {}, {})))

    fal.fail(file=itertools.repeat(half))
    for _ in range(2):
        with pytest.raises(RemoteError, match="same seed"):
            machine.run(order(num_images=2), resubmit_lost=True)
    assert fal.posts == 1


def test_a_request_without_pictures_is_collected_later_by_its_id_too(fal, machine, tmp_path):
    fal.fail(result=itertools.repeat(answer(200, {"message": "x"})))
    with pytest.raises(RemoteError, match="no list of pictures"):
        machine.run()
    [request_id] = fal.requests
    other = Machine(tmp_path / "other", fal)
    with pytest.raises(RemoteError, match="no list of pictures"):
        other.run(recover_request_id=request_id)
    fal.heal()
    assert other.run(recover_request_id=request_id).images
    assert machine.run().request_id == request_id and fal.posts == 1


def test_what_an_older_version_took_for_a_result_is_asked_for_again(fal, machine):
    """It wrote COMPLETED for answers without pictures."""
    fal.fail(status=itertools.repeat(drop()))
    with pytest.raises(RemoteError):
        machine.run(waits=replace(QUICK, silence=0.2))
    fal.heal()
    database = sqlite3.connect(machine.folder / JOURNAL, isolation_level=None)
    database.execute("UPDATE requests SET state = 'completed', response = '{\"images\": []}'")
    database.close()
    assert machine.run().images and fal.posts == 1


@pytest.mark.parametrize(
    "same",
    [
        ({"image_size": "square_hd"}, {"image_size": (1024, 1024)}),
        ({}, {"sync_mode": True}),
        ({"image_size": "portrait_16_9"}, {"image_size": (576, 1024), "sync_mode": True}),
        ({"pictures": 0}, {"pictures": 0, "image_size": "landscape_4_3"}),
        ({"pictures": 0, "image_size": (1024, 768)}, {"pictures": 0}),
    ],
    ids=str,
)
def test_one_request_under_two_names_is_bought_once(fal, machine, same):
    first, second = same
    bought = machine.run(order(**first))
    again = machine.run(order(**second))
    assert fal.posts == 1 and again.cost_usd == 0 and again.request_id == bought.request_id


def test_one_bad_picture_keeps_no_other_away(fal, machine):
    def gone(handler, proceed):
        handler.reply(*((404, {}, {}) if "/1.png" in handler.path else proceed()))

    fal.fail(file=itertools.repeat(gone))
    with pytest.raises(RemoteError, match="file is gone from fal .404.*Saved in .*_0.png, .*_2.png, .*_3.png") as error:
        machine.run(order(num_images=4))
    files = sorted(machine.results.iterdir())
    assert [file.name[-6:] for file in files] == ["_0.png", "_2.png", "_3.png"]
    assert all(file.read_bytes() == fal.picture and file.name in str(error.value) for file in files)
    seen = len(fal.seen)
    fal.heal()
    assert len(machine.run(order(num_images=4)).images) == 4 and len(fal.seen) == seen + 1 and fal.posts == 1


def test_inline_pictures_are_files_too_and_leave_the_journal(fal, machine):
    import base64

    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    fal.respond = lambda response: {**response, "images": [{"url": uri, "content_type": "image/png"}]}
    first = machine.run(order(sync_mode=True))
    assert first.files[0].read_bytes() == png() and "base64" not in first.response
    assert json.loads(first.response)["images"][0]["url"] == f"saved as {first.files[0].name}"
    assert "base64" not in machine.rows()[-1]["response"]
    first.files[0].unlink()
    with pytest.raises(RemoteError, match="came inside fal's answer, and its file .* is gone"):
        machine.run(order(sync_mode=True))
    raw = {"content": uri.partition(",")[2], "width": 64, "height": 48, "content_type": "image/png"}
    fal.respond = lambda response: {**response, "images": [raw]}
    assert machine.run(order(sync_mode=True, seed=9)).files[0].read_bytes() == png()


def test_recover_by_id(fal, machine, tmp_path):
    paid = machine.run()
    other = Machine(tmp_path / "other machine", fal)
    found = other.run(recover_request_id=paid.request_id)
    assert found.files[0].read_bytes() == png() and found.seed == 5 and found.cost_usd == 0
    seen = len(fal.seen)
    assert other.run(recover_request_id=paid.request_id).images and len(fal.seen) == seen
    assert machine.run(recover_request_id=paid.request_id).images and len(fal.seen) == seen
    assert fal.posts == 1
    for wrong, says in (("no-such-request", "does not know the request"), ("../../x", "is not a request id")):
        with pytest.raises(RemoteError, match=says):
            other.run(recover_request_id=wrong, resubmit_lost=True)
    assert fal.posts == 1


def test_an_id_that_fal_never_knew_is_no_open_request(fal, machine):
    """Only the user named it; it may be mistyped. Once fal knows it, the same run collects it."""
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"does not know the request.*\. Check recover_request_id: your"):
            machine.run(recover_request_id="mistyped")
        now = datetime.now().astimezone()
        assert overview(machine.folder, now, now)["open"] == []
    paid = machine.run()
    fal.requests["mistyped"] = fal.requests[paid.request_id]
    assert machine.run(recover_request_id="mistyped").images and fal.posts == 1


@pytest.mark.parametrize("killed", [False, True], ids=["lost", "submitting"])
def test_what_is_recovered_is_the_result_of_the_lost_submission(fal, machine, killed):
    fal.fail(submit=drop(accept=True))
    with pytest.raises(RemoteError, match="recover_request_id"):
        machine.run()
    if killed:
        database = sqlite3.connect(machine.folder / JOURNAL, isolation_level=None)
        database.execute("UPDATE requests SET state = 'submitting'")
        database.close()
    [lost] = fal.requests
    other = machine.run(order(seed=9)).request_id
    for wrong in ("no-such-request", other):  # one mistyped, one of other inputs
        with contextlib.suppress(RemoteError):
            machine.run(order(), recover_request_id=wrong)
    assert fal.posts == 2
    assert machine.run(order(), recover_request_id=lost).images
    for options in ({}, {"resubmit_lost": True}):
        again = machine.run(**options)
        assert (again.request_id, again.cost_usd, fal.posts) == (lost, 0, 2)


def test_without_a_writable_journal_nothing_is_submitted(fal, machine):
    machine.folder.mkdir(parents=True)
    (machine.folder / JOURNAL).write_bytes(b"this is not a database" * 100)
    with pytest.raises(RemoteError, match="journal .* cannot be used .*nothing was submitted"):
        machine.run()
    assert fal.posts == 0


@pytest.mark.parametrize("name", ["user", "user/locks"])
def test_without_a_usable_folder_nothing_is_submitted(fal, machine, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a file where the folder should be")
    with pytest.raises(RemoteError, match="user cannot be used .*nothing is submitted without it"):
        machine.run()
    assert fal.posts == 0


def fill_up(machine, state):
    """From now on the journal takes no row in this state."""
    database = sqlite3.connect(machine.folder / JOURNAL, isolation_level=None)
    database.execute(
        f"CREATE TRIGGER full BEFORE UPDATE ON requests WHEN NEW.state = '{state}' "
        "BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
    )
    database.close()


def free_space(machine):
    database = sqlite3.connect(machine.folder / JOURNAL, isolation_level=None)
    database.execute("DROP TRIGGER full")
    database.close()


def test_a_disk_that_is_full_when_the_result_comes_names_the_request(fal, machine):
    machine.run(order(seed=1))  # makes the journal
    fill_up(machine, "completed")
    with pytest.raises(RemoteError, match="disk is full.*request [0-9a-f-]{36} was submitted") as error:
        machine.run()
    assert list(fal.requests)[-1] in str(error.value) and fal.posts == 2
    free_space(machine)
    assert machine.run().images and fal.posts == 2


def test_a_full_disk_keeps_no_cancellation_away(fal, machine):
    machine.run(order(seed=1))
    fill_up(machine, "cancelling")
    fal.queued = 10**6
    fal.reached["status"].clear()
    interrupted(machine, fal, "status")
    assert [request["cancelled"] for request in fal.requests.values()] == [False, True]


def test_an_id_that_cannot_be_journaled_is_said(fal, machine):
    """The disk fills up while the submission is under way."""
    machine.run(order(seed=1))  # makes the journal
    fal.fail(submit=stall(0.5))

    def fill_up():
        fal.reached["submit"].clear()
        assert fal.reached["submit"].wait(10)
        database = sqlite3.connect(machine.folder / JOURNAL, isolation_level=None)
        database.execute("CREATE TRIGGER full BEFORE UPDATE ON requests BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
        database.close()

    thread = threading.Thread(target=fill_up)
    thread.start()
    time.sleep(0.1)
    with pytest.raises(RemoteError, match="fal took the request as [0-9a-f-]+, but .*disk is full.*recover_request_id"):
        machine.run()
    thread.join()
    assert len(fal.requests) == 2


def test_results_that_cannot_be_written_are_kept_at_fal(fal, machine):
    machine.results.parent.mkdir(parents=True)
    machine.results.write_text("a file where the folder should be")
    with pytest.raises(RemoteError, match="cannot be written"):
        machine.run()
    machine.results.unlink()
    assert machine.run().images and len(fal.requests) == 1


def test_the_key_is_in_no_file(fal, machine, tmp_path):
    fal.fail(submit=answer(400, {"detail": f"Invalid key {KEY}"}))  # a server that quotes it, where we quote the server
    with pytest.raises(RemoteError, match="Invalid key ..."):
        machine.run()
    line = {"status": "IN_PROGRESS", "logs": [{"message": f"key={KEY}"}]}
    fal.fail(status=answer(202, line, accept=True))
    machine.run()
    assert any("key=..." in said for said in machine.said)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes(), path
    assert not any("secret" in line for line in machine.said)
    if os.name == "posix":
        assert machine.folder.stat().st_mode & 0o077 == 0
