"""Everything that can go wrong between us and fal: submissions counted, final state, and the sentence shown.

Each fault runs once with the fault and once more after it has gone.
"""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fal_runs import PROMPT, QUICK, Machine, fal_fixture, order  # noqa: F401 - fixtures
from fal_server import answer, drop, png, stall, truncated
from klein_cns.remote.errors import RemoteError

OK = None  # the run brings its picture
FOREVER = itertools.repeat
LOST = "submitted the same inputs: .* Whether fal took it is unknown"
HTML = b"<html><body>nginx</body></html>"
PARTIAL = png((64, 48))[:60]


@dataclass(frozen=True)
class Case:
    """A fault, and what must come of it.

    Args:
        submissions: requests that fal took.
        state: of the journal's row.
        says: what the sentence must match; None where the run succeeds in spite of the fault.
        again: (submissions in all, what the sentence must match or None) of the next run, without the fault.
        warns: what a successful run must say.
    """

    name: str
    submissions: int
    state: str | None
    says: str | None
    again: tuple[int, str | None] = (1, OK)
    faults: dict[str, Any] = field(default_factory=dict)
    fal: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    order: dict[str, Any] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    warns: str = ""


def faulty(**faults: Any) -> dict[str, Any]:
    return {"faults": faults}


def responding(change: Any, **more: Any) -> dict[str, Any]:
    return {"fal": {"respond": change, **more}}


def without(*names: str) -> Any:
    return lambda response: {name: value for name, value in response.items() if name not in names}


def image(**changes: Any) -> Any:
    def change(response):
        merged = [{**entry, **changes} for entry in response["images"]]
        return {**response, "images": [{k: v for k, v in entry.items() if v is not None} for entry in merged]}

    return change


def drip(handler, proceed):
    """The honest answer, a few bytes at a time."""
    _, body, _ = proceed()
    data = json.dumps(body).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for i in range(0, len(data), 20):
        handler.wfile.write(data[i : i + 20])
        handler.wfile.flush()
        time.sleep(0.05)


INPUT_ERROR = {"detail": [{"loc": ["body", "prompt"], "msg": f"too long: {PROMPT}", "type": "x", "input": PROMPT}]}


def dribble(handler, proceed):
    """Bytes without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**9))
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
    handler.close_connection = True


BALANCE = {"detail": "User is locked. Reason: Exhausted balance. Top up at fal.ai/dashboard/billing."}

CASES = [
    Case("nothing goes wrong", 1, "saved", OK),
    # the submission
    Case("refused connection", 0, "failed", "cannot be reached", run={"address": "http://127.0.0.1:9"}),
    Case(
        "dropped before fal took it",
        0,
        "lost",
        "Whether fal took it is unknown.*resubmit_lost",
        (0, LOST),
        **faulty(submit=drop()),
    ),
    Case(
        "dropped after fal took it",
        1,
        "lost",
        "answer to the submission was lost.*resubmit_lost",
        (1, LOST),
        **faulty(submit=drop(accept=True)),
    ),
    Case("answer cut off", 1, "lost", "answer to the submission was lost", (1, LOST), **faulty(submit=truncated())),
    Case(
        "answer is not JSON",
        1,
        "lost",
        "holds no request id",
        (1, LOST),
        **faulty(submit=answer(200, HTML, accept=True)),
    ),
    Case(
        "answer without an id",
        1,
        "lost",
        "holds no request id",
        (1, LOST),
        **faulty(submit=answer(200, {}, accept=True)),
    ),
    Case(
        "id that cannot be used",
        1,
        "lost",
        "holds no request id",
        (1, LOST),
        **faulty(submit=answer(200, {"request_id": "../../etc"}, accept=True)),
    ),
    Case("slow answer", 1, "saved", OK, **faulty(submit=stall(0.3))),
    Case(
        "no answer in time",
        1,
        "lost",
        "lost .ReadTimeout.",
        (1, LOST),
        waits={"submit": 0.3},
        **faulty(submit=stall(1.0)),
    ),
    Case("408 to the submission", 0, "lost", "answered with 408", (0, LOST), **faulty(submit=answer(408))),
    Case("409 to the submission", 0, "lost", "answered with 409", (0, LOST), **faulty(submit=answer(409))),
    Case("500 to the submission", 1, "lost", "answered with 500", (1, LOST), **faulty(submit=answer(500, accept=True))),
    Case(
        "502 of a proxy to the submission",
        1,
        "lost",
        "answered with 502",
        (1, LOST),
        **faulty(submit=answer(502, HTML, accept=True)),
    ),
    Case("503 to the submission", 0, "lost", "answered with 503", (0, LOST), **faulty(submit=answer(503))),
    Case(
        "422 to the submission",
        0,
        "failed",
        "refused an input: prompt: too long: \\.\\.\\.",
        **faulty(submit=answer(422, INPUT_ERROR)),
    ),
    Case("413", 0, "failed", "too large. Give fewer", **faulty(submit=answer(413, HTML))),
    Case(
        "404 to the submission",
        0,
        "failed",
        "refused the request \\(404: Application not found\\)",
        **faulty(submit=answer(404, {"detail": "Application not found"})),
    ),
    Case("429, then taken", 1, "saved", OK, **faulty(submit=answer(429, {"detail": "slow down"}, Retry_After="0"))),
    Case(
        "429 with a Retry-After that is not a number",
        1,
        "saved",
        OK,
        **faulty(submit=answer(429, Retry_After="\u00b2")),
    ),
    Case("429 with a Retry-After that is waited for", 1, "saved", OK, **faulty(submit=answer(429, Retry_After="1"))),
    Case(
        "429 with a long Retry-After",
        0,
        "failed",
        "too many requests at once .429.",
        **faulty(submit=answer(429, Retry_After="3600")),
    ),
    Case("429 without end", 0, "failed", "too many requests at once", **faulty(submit=FOREVER(answer(429)))),
    Case(
        "bad key",
        0,
        "failed",
        "does not accept the key.*dashboard/keys",
        **faulty(submit=answer(401, {"detail": "Invalid key test-key-id:0123456789abcdef-secret"})),
    ),
    Case(
        "forbidden key", 0, "failed", "does not accept the key", **faulty(submit=answer(403, {"detail": "no access"}))
    ),
    Case(
        "exhausted balance",
        0,
        "failed",
        "balance of your fal account is exhausted",
        **faulty(submit=answer(403, BALANCE)),
    ),
    Case("payment required", 0, "failed", "balance of your fal account is exhausted", **faulty(submit=answer(402))),
    Case(
        "redirect of the API",
        0,
        "failed",
        "redirects to example.com; the key is sent to",
        **faulty(submit=answer(307, Location="https://example.com/x")),
    ),
    # the polls
    Case("500 to polls", 1, "saved", OK, **faulty(status=[answer(500)] * 3)),
    Case("502 of a proxy to polls", 1, "saved", OK, **faulty(status=[answer(502, HTML)] * 2)),
    Case("503 to polls", 1, "saved", OK, **faulty(status=[answer(503)] * 3)),
    Case("429 to polls", 1, "saved", OK, **faulty(status=[answer(429, Retry_After="1")] * 2)),
    Case("lost between polls", 1, "saved", OK, **faulty(status=[drop()] * 2)),
    Case("polls cut off", 1, "saved", OK, **faulty(status=[truncated()] * 2)),
    Case("polls that are not JSON", 1, "saved", OK, **faulty(status=[answer(200, HTML)] * 3)),
    Case("polls that are a list", 1, "saved", OK, **faulty(status=[answer(200, [1])] * 3)),
    Case("unknown status", 1, "saved", OK, **faulty(status=[answer(200, {"status": "PAUSED"})] * 3)),
    Case(
        "status without logs",
        1,
        "saved",
        OK,
        **faulty(
            status=[
                answer(202, {"status": "IN_QUEUE"}, accept=True),
                answer(202, {"status": "IN_PROGRESS"}, accept=True),
                answer(200, {"status": "COMPLETED"}, accept=True),
            ]
        ),
    ),
    Case(
        "logs of another type",
        1,
        "saved",
        OK,
        **faulty(status=answer(202, {"status": "IN_PROGRESS", "logs": "x"}, accept=True)),
    ),
    Case("404 just after the submission", 1, "saved", OK, **faulty(status=[answer(404)] * 2)),
    Case(
        "network gone for long",
        1,
        "submitted",
        "no usable answer from fal for 0.3 s. Run again",
        waits={"silence": 0.3, "answer": 0.2},
        **faulty(status=FOREVER(drop())),
    ),
    Case("slow polls", 1, "saved", OK, **faulty(status=[stall(0.3)] * 2)),
    Case(
        "key revoked while it runs",
        1,
        "submitted",
        "does not accept the key.*goes on at fal.*Run again .*same seed",
        **faulty(status=FOREVER(answer(401))),
    ),
    Case(
        "key revoked before the result",
        1,
        "submitted",
        "does not accept the key.*goes on at fal",
        **faulty(result=FOREVER(answer(403, {"detail": "no"}))),
    ),
    *(
        Case(f"{status} to {count} polls", 1, "saved", OK, **faulty(status=[answer(status)] * count))
        for status in (401, 403)
        for count in (1, 3)
    ),
    Case("401 to one look at the result", 1, "saved", OK, **faulty(result=answer(401))),
    Case(
        "fal forgets the request",
        1,
        "submitted",
        "does not know the request .*key of another account.*Run again .*resubmit_lost",
        (1, OK),
        **faulty(status=FOREVER(answer(404))),
    ),
    Case("fal forgets and remembers", 1, "saved", OK, waits={"gone": 0.5}, **faulty(status=[answer(404)] * 12)),
    Case(
        "404, 401 and 500 in turn without end",
        1,
        "submitted",
        "no usable answer from fal for 0.4 s",
        waits={"silence": 0.4},
        **faulty(status=itertools.cycle([answer(404), answer(401), answer(500)])),
    ),
    Case(
        "completed, and then at work again",
        1,
        "submitted",
        "still runs at fal after 0.3 s",
        (1, OK),
        fal={"running": 10**6},
        waits={"running": 0.3},
        faults={"status": answer(200, {"status": "COMPLETED", "logs": []}), "result": answer(400)},
    ),
    Case(
        "polls that are too large",
        1,
        "saved",
        OK,
        run={"max_answer": 2000},
        **faulty(status=[answer(200, b" " * 3000)] * 2),
    ),
    Case("polls of a great depth", 1, "saved", OK, **faulty(status=[answer(200, b"[" * 200_000)] * 2)),
    Case(
        "logs with half of a character",
        1,
        "saved",
        OK,
        **faulty(status=answer(202, {"status": "IN_PROGRESS", "logs": [{"message": "a \ud83d cat"}]}, accept=True)),
    ),
    Case(
        "too long in the queue",
        1,
        "submitted",
        "still waits in fal's queue after 0.3 s; it stays there. Run again",
        fal={"queued": 10**6},
        waits={"queue": 0.3},
    ),
    Case(
        "too long on the machine",
        1,
        "submitted",
        "still runs at fal after 0.3 s; it goes on. Run again",
        fal={"running": 10**6},
        waits={"running": 0.3},
    ),
    # the result
    Case("500 to the result, from a proxy", 1, "saved", OK, **faulty(result=[answer(500, HTML)] * 2)),
    Case("result cut off", 1, "saved", OK, **faulty(result=truncated())),
    Case("result is not JSON", 1, "saved", OK, **faulty(result=answer(200, HTML))),
    Case("slow result", 1, "saved", OK, waits={"answer": 0.3, "silence": 1.0}, **faulty(result=FOREVER(drip))),
    Case("result lost", 1, "saved", OK, **faulty(result=[drop()] * 2)),
    Case(
        "result never comes",
        1,
        "submitted",
        "completed the request .* could not be fetched.*resubmit_lost",
        waits={"silence": 0.3},
        **faulty(result=FOREVER(answer(500, HTML))),
    ),
    Case(
        "oversized result",
        1,
        "submitted",
        "fal's answer is larger than 0 MiB",
        run={"max_answer": 2000},
        **faulty(result=answer(200, b" " * 3000)),
    ),
    Case(
        "oversized result, compressed",
        1,
        "submitted",
        "fal's answer is larger than 0 MiB",
        run={"max_answer": 2000},
        **faulty(result=FOREVER(answer(200, gzip.compress(b" " * 10**6), Content_Encoding="gzip"))),
    ),
    Case(
        "result compressed twice",
        1,
        "saved",
        OK,
        **faulty(result=answer(200, gzip.compress(gzip.compress(b"{}")), Content_Encoding="gzip, gzip")),
    ),
    Case(
        "result of a great depth",
        1,
        "saved",
        OK,
        **faulty(result=answer(200, b'{"images": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")),
    ),
    Case(
        "result a little too deep",
        1,
        "saved",
        OK,
        **faulty(result=answer(200, b'{"images": ' + b"[" * 80 + b"]" * 80 + b"}")),
    ),
    Case(
        "result that drips without end",
        1,
        "submitted",
        "its result could not be fetched for 0.4 s",
        waits={"transfer": 0.3, "silence": 0.4},
        **faulty(result=FOREVER(dribble)),
    ),
    *(
        Case(
            f"{status} to {count} looks at the result",
            1,
            "saved",
            OK,
            waits={"gone": 0.5},
            **faulty(result=[answer(status)] * count),
        )
        for status in (404, 410)
        for count in (1, 6, 12)
    ),
    Case("gone result", 1, "submitted", "result of the request .* is gone", **faulty(result=FOREVER(answer(404)))),
    Case(
        "422 as the result",
        1,
        "failed",
        "refused an input: prompt: too long: \\.\\.\\.",
        (2, OK),
        **faulty(result=answer(422, INPUT_ERROR)),
    ),
    Case(
        "the model fails",
        1,
        "failed",
        "the model failed on fal's machine .runner_server_error.",
        (2, OK),
        **faulty(result=FOREVER(answer(500, {"detail": "x", "error_type": "runner_server_error"}))),
    ),
    *(
        Case(
            f"{count} of {kind}",
            1,
            "saved",
            OK,
            **faulty(result=[answer(500, {"detail": "x"}, X_Fal_Error_Type=kind)] * count),
        )
        for kind in ("runner_server_error", "request_timeout", "client_cancelled")
        for count in (1, 2)
    ),
    Case("499 of a proxy to the result", 1, "saved", OK, **faulty(result=[answer(499)] * 2)),
    Case(
        "failures between other faults",
        1,
        "saved",
        OK,
        **faulty(result=[answer(500, {}, X_Fal_Error_Type="internal_error"), answer(502, HTML)] * 3),
    ),
    Case(
        "the status says that it failed",
        1,
        "failed",
        "fal failed .500.* does not charge",
        (2, OK),
        **faulty(
            status=answer(200, {"status": "COMPLETED", "logs": [], "error": "it broke"}), result=answer(500, HTML)
        ),
    ),
    Case(
        "429 to the result",
        1,
        "saved",
        OK,
        **faulty(result=answer(429, {"detail": "slow down"}, X_Fal_Error_Type="rate_limit")),
    ),
    Case(
        "result asked for too early",
        1,
        "saved",
        OK,
        **faulty(result=answer(400, {"detail": "Request is still in progress"})),
    ),
    *(
        Case(
            f"{status} of a proxy to the result",
            1,
            "submitted",
            "result could not be fetched.*resubmit_lost",
            waits={"silence": 0.3},
            **faulty(result=FOREVER(answer(status, body))),
        )
        for status, body in ((400, {"error": "bad gateway"}), (407, {"message": "log in"}), (451, {"detail": "no"}))
    ),
    Case(
        "503 of fal's own gateway to the result", 1, "saved", OK, **faulty(result=[answer(503, {"detail": "busy"})] * 2)
    ),
    Case(
        "fal's time limit",
        1,
        "failed",
        "not finished within fal's time limit",
        (2, OK),
        **faulty(result=FOREVER(answer(504, {"detail": "x", "error_type": "request_timeout"}))),
    ),
    Case(
        "no machine began it",
        1,
        "failed",
        "no machine of fal's began it in time",
        (2, OK),
        **faulty(result=FOREVER(answer(504, {"detail": "x"}, X_Fal_Error_Type="startup_timeout"))),
    ),
    Case(
        "cancelled elsewhere",
        1,
        "cancelled",
        "was cancelled at fal",
        (2, OK),
        **faulty(result=FOREVER(answer(499, {"detail": "x", "error_type": "client_cancelled"}))),
    ),
    Case(
        "no pictures in it",
        1,
        "submitted",
        "holds no list of pictures.*Run again .*same seed",
        (1, "no list of pictures"),
        **responding(without("images")),
    ),
    Case(
        "empty pictures in it",
        1,
        "submitted",
        "holds no picture.*Run again",
        (1, "holds no picture"),
        **responding(lambda response: {**response, "images": []}),
    ),
    Case(
        "picture without an address",
        1,
        "submitted",
        "names no address.*Run again",
        (1, "names no address"),
        **responding(image(url="")),
    ),
    *(
        Case(
            f"no pictures for a while: {str(body)[:20]}",
            1,
            "saved",
            OK,
            waits={"gone": 0.5},
            **faulty(result=[answer(200, body)] * count),
        )
        for body, count in (
            ({"message": "x"}, 1),
            ({"images": []}, 7),
            ({"images": [None]}, 1),
            ({"images": None}, 1),
            ([], 1),
            ("text", 2),
            ({"images": [{"url": "data:image/png;base64,%"}]}, 2),
        )
    ),
    Case(
        "no pictures at first, collected later",
        1,
        "submitted",
        "holds no list of pictures",
        **faulty(result=FOREVER(answer(200, {"message": "still warming up"}))),
    ),
    Case(
        "only pictures in it",
        1,
        "saved",
        OK,
        warns="seed is missing",
        **responding(without("seed", "timings", "prompt", "has_nsfw_concepts")),
    ),
    Case(
        "fields of other types",
        1,
        "saved",
        OK,
        warns="timings in fal's response is unusable",
        **responding(lambda response: {**response, "timings": 3, "seed": "x", "has_nsfw_concepts": "no"}),
    ),
    Case(
        "picture's fields of other types",
        1,
        "saved",
        OK,
        warns="width in fal's response is unusable",
        **responding(image(width="wide")),
    ),
    Case(
        "fewer pictures than asked for",
        1,
        "saved",
        OK,
        warns="1 pictures came, 2 were asked for",
        **responding(lambda response: {**response, "images": response["images"][:1]}),
        order={"num_images": 2},
    ),
    # the file
    Case("file server fails", 1, "saved", OK, **faulty(file=[answer(503), drop()])),
    Case("file cut off", 1, "saved", OK, **faulty(file=truncated())),
    Case(
        "file never comes whole",
        1,
        "completed",
        "did not arrive whole .*Run again",
        **faulty(file=FOREVER(truncated())),
    ),
    Case(
        "expired file",
        1,
        "completed",
        "file is gone from fal .404.*Run again .*same seed.*resubmit_lost",
        **faulty(file=FOREVER(answer(404))),
    ),
    *(
        Case(
            f"{status} to {count} looks at the file",
            1,
            "saved",
            OK,
            waits={"gone": 1.0},
            **faulty(file=[answer(status)] * count),
        )
        for status in (403, 404, 410)
        for count in (1, 4)
    ),
    Case(
        "oversized file, compressed",
        1,
        "completed",
        "the file is larger than 0 MiB",
        run={"max_file": 5000},
        **faulty(file=answer(200, gzip.compress(bytes(10**6)), Content_Encoding="gzip")),
    ),
    Case(
        "file that drips without end",
        1,
        "completed",
        "did not arrive within 0.3 s.*Run again",
        waits={"transfer": 0.3, "tries": 1},
        **faulty(file=FOREVER(dribble)),
    ),
    Case(
        "web page as file",
        1,
        "completed",
        "is saved as .*_0.bin, but it is not a",
        **faulty(file=answer(200, HTML)),
    ),
    Case("spoiled file", 1, "completed", "cannot be decoded .*fetches it again", **faulty(file=answer(200, PARTIAL))),
    Case("oversized file", 1, "completed", "larger than 0 MiB", run={"max_file": 50}),
    Case(
        "too many pixels",
        1,
        "completed",
        "8192x4096, more than",
        (1, "8192x4096, more than"),
        fal={"picture": png((8192, 4096))},
    ),
    Case(
        "another size than asked for",
        1,
        "saved",
        OK,
        warns="is 64x48, asked for was 512x512",
        order={"image_size": "square"},
    ),
    Case("another size than said", 1, "saved", OK, warns="fal said 10x20", **responding(image(width=10, height=20))),
    Case("another length than said", 1, "saved", OK, warns="fal said 5", **responding(image(file_size=5))),
    Case(
        "redirect to a private address",
        1,
        "completed",
        "leads into a private network .10.0.0.1.",
        **faulty(file=answer(302, Location="https://10.0.0.1/x.png")),
    ),
    Case(
        "redirect to this machine",
        1,
        "completed",
        "leads into a private network .localhost.",
        **faulty(file=answer(302, Location="https://localhost/x.png")),
    ),
    Case(
        "redirect without TLS",
        1,
        "completed",
        "only https is followed",
        **faulty(file=answer(302, Location="http://169.254.169.254/latest/meta-data")),
    ),
    Case("redirect on the API's host", 1, "saved", OK, **faulty(file=answer(302, Location="/files/elsewhere.png"))),
    Case(
        "redirect without end",
        1,
        "completed",
        "redirects more than 5 times",
        **faulty(file=FOREVER(answer(302, Location="/files/x.png"))),
    ),
    Case(
        "address inside the network",
        1,
        "completed",
        "private network .192.168.1.1.",
        (1, "private network"),
        **responding(image(url="https://192.168.1.1/x.png")),
    ),
    # what fal thinks of it
    Case(
        "flagged",
        1,
        "saved",
        "safety checker flagged picture 1 of 1",
        (1, "safety checker flagged"),
        **responding(lambda response: {**response, "has_nsfw_concepts": [True]}),
    ),
    *(
        Case(
            f"flagged as {flags}",
            1,
            "saved",
            "flagged picture 1 of 1",
            (1, "safety checker flagged"),
            **responding(lambda response, flags=flags: {**response, "has_nsfw_concepts": flags}),
        )
        for flags in (True, [True, None])
    ),
    Case(
        "flagged, passed on",
        1,
        "saved",
        OK,
        run={"on_flagged": "pass"},
        **responding(lambda response: {**response, "has_nsfw_concepts": [True]}),
    ),
    # inside the answer
    Case(
        "inline, spoiled",
        1,
        "submitted",
        "not base64.*Run again",
        (1, "not base64"),
        **responding(image(url="data:image/png;base64,%")),
    ),
    # money
    Case("too expensive", 0, None, "costs \\$0.0400, more than max_cost_usd 0.01", run={"max_cost_usd": 0.01}),
]


def outcome(machine, ordered, **options):
    """(what was collected, None) or (None, the sentence)."""
    try:
        return machine.run(ordered, **options), None
    except RemoteError as error:
        return None, str(error)


def judge(found, says, warns=""):
    collected, sentence = found
    if says is OK:
        assert sentence is None
        assert [picture.mode for picture in collected.images] == ["RGB"] and collected.files[0].is_file()
        assert warns in "; ".join(collected.warnings)
    else:
        assert sentence is not None and re.search(says, sentence, re.S), sentence
        assert PROMPT not in sentence and "secret" not in sentence
        assert sentence.endswith(".")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault(case, fal, tmp_path, monkeypatch):
    machine, options = Machine(tmp_path, fal), dict(case.run)
    machine.address = options.pop("address", machine.address)
    for option, limit in (("max_file", "limits.MAX_FILE"), ("max_answer", "limits.MAX_ANSWER")):
        if option in options:
            monkeypatch.setattr(f"klein_cns.remote.{limit}", options.pop(option))
    for name, value in case.fal.items():
        setattr(fal, name, value)
    fal.fail(**case.faults)
    ordered = order(**case.order)

    found = outcome(machine, ordered, waits=replace(QUICK, **case.waits), **options)
    assert (len(fal.requests), machine.state()) == (case.submissions, case.state), found[1]
    judge(found, case.says, case.warns)

    fal.heal()
    monkeypatch.undo()
    machine.address = fal.url
    if "queued" in case.fal or "running" in case.fal:
        fal.queued = fal.running = 0
    found = outcome(machine, ordered, on_flagged=options.get("on_flagged", "error"))
    submissions, says = case.again
    assert len(fal.requests) == submissions, found[1]
    judge(found, says, case.warns)


def test_the_key_goes_to_the_api_alone(fal, tmp_path):
    Machine(tmp_path, fal).run()
    for _, path, headers in fal.seen:
        assert ("Authorization" in headers) == (not path.startswith("/files/")), path
        assert "Authorization" not in headers or headers["Accept-Encoding"] == "identity"  # so that a size is its size


def test_the_real_client_would_submit_ten_times(fal, monkeypatch):
    """Why the POST is ours: fal-client repeats what it has no answer to."""
    import fal_client.client

    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", fal.url + "/")
    monkeypatch.setattr(fal_client.client, "BASE_DELAY", 0.001)
    fal.fail(submit=FOREVER(drop(accept=True)))
    with pytest.raises(httpx.HTTPError):
        fal_client.SyncClient(key="x").submit("fal-ai/flux-2/klein/9b/base", {"prompt": "x"})
    assert len(fal.requests) == fal_client.client.MAX_ATTEMPTS > 1


def test_what_was_sent_is_the_order_and_nothing_else(fal, tmp_path):
    machine = Machine(tmp_path, fal)
    machine.run()
    [request] = fal.requests.values()
    assert request["endpoint"] == "/fal-ai/flux-2/klein/9b/base/edit/lora"
    assert "image_size" not in request["body"]  # auto: the endpoint's own default
    assert request["body"]["image_urls"][0].startswith("data:image/png;base64,")
    assert request["body"]["seed"] == 5 and request["body"]["loras"] == []
    row = machine.rows()[-1]
    assert json.loads(row["response"])["seed"] == 5 and row["request_id"] in fal.requests


@pytest.mark.parametrize(
    "prompt",
    [
        "a secret launch " * 40,
        'it\'s a "secret" launch\nof the thing',
        "back\\slash secret",
        "secret \u00e9t\u00e9",
    ],
    ids=["long", "quotes", "backslash", "unicode"],
)
@pytest.mark.parametrize("quote", [str, repr, json.dumps], ids=["plain", "repr", "json"])
def test_a_prompt_that_fal_quotes_is_repeated_nowhere(fal, tmp_path, prompt, quote):
    machine = Machine(tmp_path, fal)
    for status, detail in (
        (400, f"bad prompt {quote(prompt)}"),
        (422, [{"loc": ["body", "prompt"], "msg": f"rejected: {quote(prompt)}", "input": prompt}]),
    ):
        fal.fail(submit=answer(status, {"detail": detail}))
        with pytest.raises(RemoteError, match=r"\.\.\.") as error:
            machine.run(order(prompt=prompt))
        assert "secret" not in str(error.value) + machine.rows()[-1]["error"]
    fal.fail(status=answer(202, {"status": "IN_PROGRESS", "logs": [{"message": f"p={quote(prompt)}"}]}, accept=True))
    machine.run(order(prompt=prompt))
    assert not any("secret" in line for line in machine.said)


ROOT = Path(__file__).resolve().parents[1]


def sentences(path):
    """Every text of a module, with what stands beside it in the same expression; its docstrings left out."""
    tree = ast.parse(path.read_text())
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value


def test_who_says_run_again_says_with_the_same_seed():
    """Klein on fal's seed decides what is bought; the same words with another seed are another purchase."""
    files = [*(ROOT / "remote").glob("*.py"), ROOT / "nodes" / "fal_edit.py", ROOT / "nodes" / "fal_requests.py"]
    whole = [text for path in files for text in sentences(path) if re.search(r"run(s|ning)? again", text, re.I)]
    parts = [part for text in whole for part in re.split(r"(?<=[.;]) ", text) if re.search("run.* again", part, re.I)]
    assert len(parts) > 5
    assert not [part for part in parts if "same seed" not in part]


def test_one_spoiled_picture_is_left_out_and_the_others_are_saved(fal, tmp_path):
    """Whatever stands in its place; the flags keep their pictures."""
    places = {}
    for number, spoiled in enumerate((None, "text", [], {}, {"url": 5}, {"url": ""}, {"content": "%"})):

        def respond(response, spoiled=spoiled):
            images = list(response["images"])
            images[2] = spoiled
            return {**response, "images": images, "has_nsfw_concepts": [False, False, True, False]}

        fal.respond = respond
        machine = Machine(tmp_path / str(number), fal)
        found = machine.run(order(num_images=4, seed=number), on_flagged="pass")
        assert len(found.images) == 3 and machine.state() == "saved"
        assert sorted(path.name[-6:] for path in machine.results.iterdir()) == ["_0.png", "_1.png", "_3.png"]
        assert "picture 3 of fal's response" in found.warnings[0], found.warnings
        assert "3 pictures came, 4 were asked for" in found.warnings
        with pytest.raises(RemoteError, match="flagged picture 3 of 4"):
            machine.run(order(num_images=4, seed=number))
        places[str(spoiled)] = fal.posts
    assert list(places.values()) == list(range(1, 8))
