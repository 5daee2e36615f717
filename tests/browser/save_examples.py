"""Lay out the example workflows for what their nodes are after a run, and save them again through the frontend.

For when a node's inputs or its size have changed. It starts a ComfyUI with the tiny klein and a fake of fal, and needs
what the tests of this folder need::

    CHROMIUM=... PLAYWRIGHT_CORE=... uv run python tests/browser/save_examples.py [FOLDER]

With FOLDER it also puts pictures there of every example after a run, in both renderers. `make_cards.py` draws the
cards.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from comfy_base import serve_examples, tiny_pipeline  # noqa: E402
from comfy_host import find_comfyui  # noqa: E402
from fal_server import FalServer, png  # noqa: E402


def main() -> int:
    """The exit status of the script in the browser."""
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("no ComfyUI: set COMFYUI_PATH and COMFYUI_PYTHON")
    fal = FalServer()
    fal.picture = png((512, 512), (120, 120, 120))
    with tempfile.TemporaryDirectory() as folder:
        server = serve_examples(comfyui, Path(folder), tiny_pipeline(comfyui[0]), fal)
        try:
            script = Path(__file__).with_suffix(".mjs")
            command = ["node", str(script), f"http://127.0.0.1:{server.port}", *sys.argv[1:2]]
            return subprocess.run(command, check=False).returncode
        finally:
            server.stop()
            fal.close()


if __name__ == "__main__":
    sys.exit(main())
