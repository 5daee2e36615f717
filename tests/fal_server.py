"""A fake of fal on loopback: its queue, its files and its uploads. It counts, and it can fail at every point.

A fault is a function of (handler, proceed). ``proceed()`` does what an honest server would do at that point and returns
(status, body, headers); the fault decides what of it, if anything, reaches the client.
"""

from __future__ import annotations

import io
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

POINTS = ("submit", "status", "result", "cancel", "file", "token", "upload")
KEY = "test-key-id:0123456789abcdef-secret"


def png(size=(64, 48), color=(200, 30, 30)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return data.getvalue()


def answer(status: int, body: Any = None, accept: bool = False, **headers: str) -> Callable:
    """Answer so in place of the honest answer; with ``accept`` the honest thing is done all the same."""

    def fault(handler, proceed):
        if accept:
            proceed()
        handler.reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})

    return fault


def drop(accept: bool = False) -> Callable:
    """Close the connection without an answer."""

    def fault(handler, proceed):
        if accept:
            proceed()
        handler.hang_up()

    return fault


def truncated(accept: bool = True) -> Callable:
    """Half of the honest answer, then nothing."""

    def fault(handler, proceed):
        status, body, headers = proceed() if accept else (200, {}, {})
        handler.reply(status, body, headers, share=0.5)
        handler.hang_up()

    return fault


def stall(seconds: float, accept: bool = True) -> Callable:
    """The honest answer, after a while."""

    def fault(handler, proceed):
        found = proceed() if accept else None
        time.sleep(seconds)
        handler.reply(*(found or proceed()))

    return fault


class FalServer:
    """The fake; ``url`` is its address.

    Args:
        queued, running: how many polls a request stays so.
        files: bytes of the result pictures, given out in turn.
        respond: changes the honest response.
    """

    def __init__(self) -> None:
        self.faults: dict[str, Any] = {}
        self.requests: dict[str, dict[str, Any]] = {}
        self.posts = 0
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.uploads: dict[str, bytes] = {}
        self.queued, self.running = 1, 1
        self.picture = png()
        self.respond: Callable[[dict[str, Any]], Any] = lambda response: response
        self.reached = {point: threading.Event() for point in POINTS}
        self._lock = threading.Lock()
        fal = self

        class Handler(_Handler):
            server_state = fal

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def fail(self, **faults: Iterable[Callable] | Callable) -> None:
        """At each point named: one fault, or several in turn; after the last the server is honest again."""
        for point, found in faults.items():
            self.faults[point] = iter([found] if callable(found) else found)

    def heal(self) -> None:
        """Be honest from now on."""
        self.faults.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # what an honest fal does -------------------------------------------------------------------------------------

    def submit(self, path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        request_id = str(uuid.uuid4())
        with self._lock:
            self.requests[request_id] = {"endpoint": path, "body": body, "polls": 0, "cancelled": False}
        return 200, {"request_id": request_id, "status": "IN_QUEUE"}, {}

    def status(self, request_id: str) -> tuple[int, Any, dict[str, str]]:
        request = self.requests.get(request_id)
        if request is None:
            return 404, {"detail": "Request not found"}, {}
        request["polls"] += 1
        if request["cancelled"]:
            return 200, {"status": "COMPLETED", "logs": [], "error": "cancelled", "error_type": "client_cancelled"}, {}
        if request["polls"] <= self.queued:
            return 202, {"status": "IN_QUEUE", "queue_position": self.queued - request["polls"]}, {}
        if request["polls"] <= self.queued + self.running:
            return 202, {"status": "IN_PROGRESS", "logs": [{"message": "denoising 14 of 28"}]}, {}
        return 200, {"status": "COMPLETED", "logs": [], "metrics": {"inference_time": 1.5}}, {}

    def result(self, request_id: str) -> tuple[int, Any, dict[str, str]]:
        request = self.requests.get(request_id)
        if request is None:
            return 404, {"detail": "Request not found"}, {}
        if request["cancelled"]:
            return 499, {"detail": "Request was cancelled", "error_type": "client_cancelled"}, {}
        if request["polls"] <= self.queued + self.running:
            return 400, {"detail": "Request is still in progress"}, {}
        body = request["body"]
        images = [
            {"url": f"{self.url}/files/{request_id}/{i}.png", "content_type": "image/png"}
            for i in range(body.get("num_images", 1))
        ]
        response = {
            "images": images,
            "seed": body.get("seed", 77),
            "prompt": body["prompt"],
            "has_nsfw_concepts": [False] * len(images),
            "timings": {"inference": 1.5},
        }
        return 200, self.respond(response), {}

    def cancel(self, request_id: str) -> tuple[int, Any, dict[str, str]]:
        request = self.requests.get(request_id)
        if request is None:
            return 404, {"status": "NOT_FOUND"}, {}
        if request["polls"] > self.queued + self.running:
            return 400, {"status": "ALREADY_COMPLETED"}, {}
        request["cancelled"] = True
        return 202, {"status": "CANCELLATION_REQUESTED"}, {}

    def file(self, path: str) -> tuple[int, Any, dict[str, str]]:
        if path in self.uploads:
            return 200, self.uploads[path], {"Content-Type": "application/octet-stream"}
        return (200, self.picture, {"Content-Type": "image/png"}) if path.startswith("/files/") else (404, {}, {})

    def token(self) -> tuple[int, Any, dict[str, str]]:
        expiry = "2099-01-01T00:00:00+00:00"
        return 200, {"token": "cdn", "token_type": "Bearer", "base_url": self.url, "expires_at": expiry}, {}

    def upload(self, data: bytes) -> tuple[int, Any, dict[str, str]]:
        path = f"/files/upload/{len(self.uploads)}"
        self.uploads[path] = data
        return 200, {"access_url": self.url + path}, {}


class _Handler(BaseHTTPRequestHandler):
    server_state: FalServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for head and body

    def do_POST(self) -> None:
        fal, data = self.server_state, self._body()
        self._see()
        if self.path.startswith("/storage/auth/token"):
            return self._at("token", fal.token)
        if self.path == "/files/upload":
            return self._at("upload", lambda: fal.upload(data))
        assert not self.path.startswith("/storage"), self.path
        fal.posts += 1
        return self._at("submit", lambda: fal.submit(self.path, json.loads(data)))

    def do_GET(self) -> None:
        fal, path = self.server_state, self.path.partition("?")[0]
        self._see()
        if path.startswith("/files/"):
            return self._at("file", lambda: fal.file(path))
        request_id = path.split("/requests/")[1].split("/")[0]
        if path.endswith("/status"):
            return self._at("status", lambda: fal.status(request_id))
        return self._at("result", lambda: fal.result(request_id))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self._body()
        self._see()
        request_id = self.path.split("/requests/")[1].split("/")[0]
        self._at("cancel", lambda: self.server_state.cancel(request_id))

    def reply(self, status: int, body: Any, headers: dict[str, str], share: float = 1.0) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: round(len(data) * share)])
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass

    def _at(self, point: str, proceed: Callable[[], tuple[int, Any, dict[str, str]]]) -> None:
        fault = next(self.server_state.faults.get(point, iter(())), None)
        self.server_state.reached[point].set()
        try:
            if fault is None:
                self.reply(*proceed())
            else:
                fault(self, proceed)
        except OSError:
            self.close_connection = True  # the client has gone

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _see(self) -> None:
        self.server_state.seen.append((self.command, self.path, dict(self.headers)))
