"""What benchmarks share that run in ComfyUI's Python: starting there, and importing this pack as ComfyUI does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def worker(file: str, *args: str) -> object:
    """The answer of ``file --worker ARGS...`` in a process of ComfyUI's Python (COMFYUI_PATH, COMFYUI_PYTHON)."""
    comfyui, python = os.environ["COMFYUI_PATH"], os.environ["COMFYUI_PYTHON"]
    done = subprocess.run(
        [python, file, "--worker", *args], cwd=comfyui, env={**os.environ, "PYTHONPATH": comfyui},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def answer(functions: dict[str, Callable[..., object]], name: str, *args: str) -> None:
    """Call one of ``functions`` and print what it returns as JSON, for `worker` to read."""
    sys.path.insert(0, os.getcwd())
    print(json.dumps(functions[name](*args)))


def import_pack(*flags: str) -> None:
    """Make this pack importable as ``klein_pack``, in a ComfyUI started with ``flags``."""
    import comfy.options

    sys.argv = ["benchmark", *flags]
    comfy.options.enable_args_parsing()
    spec = importlib.util.spec_from_file_location(
        "klein_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["klein_pack"] = module
    spec.loader.exec_module(module)
