"""A real ComfyUI for tests: finding it, starting its server on a free port, and running graphs through /prompt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parents[1]
START = 300  # seconds that a ComfyUI may take until it answers; on a busy machine it needs minutes
FLAGS = ("--cpu", "--fp32-unet", "--fp32-vae", "--fp32-text-enc", "--preview-method", "latent2rgb")


def find_comfyui() -> tuple[Path, Path] | None:
    """(ComfyUI's folder, its Python): ``COMFYUI_PATH``, the folder above ``custom_nodes``, or ``~/comfy/ComfyUI``."""
    above = ROOT.parent.parent if ROOT.parent.name == "custom_nodes" else None
    for folder in (os.environ.get("COMFYUI_PATH"), above, Path.home() / "comfy" / "ComfyUI"):
        if folder is None or not (Path(folder) / "comfy" / "samplers.py").is_file():
            continue
        for python in (os.environ.get("COMFYUI_PYTHON"), *Path(folder).glob("*venv/bin/python")):
            if python is not None and Path(python).is_file():
                return Path(folder), Path(python)
    return None


class Failed(Exception):
    """A prompt that the server refused or that failed; its text is what a user reads."""


class Run:
    """What a browser hears of a run: (node, value, max) of progress, what nodes send, their texts, and previews."""

    def __init__(self) -> None:
        self.progress: list[tuple[str, int, int]] = []
        self.outputs: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.previews: list[bytes] = []
        self.entry: dict[str, Any] = {}

    def take(self, message: bytes) -> None:
        """A binary message: 1 and 4 are pictures, 3 is a node's id and a text."""
        kind = int.from_bytes(message[:4], "big")
        if kind == 3:
            length = int.from_bytes(message[4:8], "big")
            self.texts.append(message[8 + length :].decode())
        else:
            self.previews.append(message)


class Server:
    """A ComfyUI server of its own base folder.

    Args:
        base: a folder with ``custom_nodes``, ``models``, ``input`` and ``output``.
        environment: variables besides this process's own.
    """

    def __init__(self, folder: Path, python: Path, base: Path, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = base
        self.log = base / f"server_{self.port}.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._process = subprocess.Popen(
            [
                python,
                folder / "main.py",
                "--listen",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--base-directory",
                base,
                "--database-url",
                "sqlite:///:memory:",
                *FLAGS,
            ],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.log.read_text()[-4000:]}")
            try:
                stated = self.get("/system_stats")["system"]["comfyui_version"]
                self.version = tuple(int(number) for number in stated.split(".")[:2])
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not answer within {START} s:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """End the process that this object started."""
        self._process.terminate()
        self._process.wait(timeout=30)

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: Any) -> Any:
        """JSON of a POST; a 400 raises `Failed` with the server's words."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise Failed(error.read().decode()) from error

    def run(self, prompt: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queue an API-format graph and wait; its history entry, or `Failed` with the node's sentence."""
        return self.wait(self.post("/prompt", {"prompt": prompt})["prompt_id"], timeout)

    def watch(self, prompt: dict[str, Any], interrupt_at: str | None = None) -> Run:
        """Run a graph as a browser does: listening. ``interrupt_at`` interrupts it once that node runs.

        Raises:
            Failed: as `run`.
        """
        heard, client = Run(), uuid.uuid4().hex
        with connect(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", max_size=None) as socket:
            prompt_id = self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
            while True:
                message = socket.recv(timeout=300)
                if isinstance(message, bytes):
                    heard.take(message)
                    continue
                event = json.loads(message)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id") != prompt_id:
                    continue
                if kind == "progress":
                    heard.progress.append((data["node"], data["value"], data["max"]))
                if kind == "executed" and data["output"]:
                    heard.outputs.append(data["output"])
                    heard.texts += data["output"].get("text", [])
                if kind == "executing" and data["node"] == interrupt_at and interrupt_at is not None:
                    self.post("/interrupt", {"prompt_id": prompt_id})
                if kind in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        heard.entry = self.wait(prompt_id)
        return heard

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """The history entry of a queued prompt once it is done."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                for kind, message in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise Failed(f"{message['exception_type']}: {message['exception_message']}")
                    if kind == "execution_interrupted":
                        raise Failed("interrupted")
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} is not done after {timeout} s:\n{self.log.read_text()[-4000:]}")
