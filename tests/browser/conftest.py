"""ComfyUI's frontend in a headless Chromium; skipped where that or playwright-core is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parent / "driver.mjs"


class Page:
    """One page of a server's frontend, driven through `driver.mjs`."""

    def __init__(self, address: str, renderer: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["node", DRIVER, address, renderer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        assert line, "the page is gone; what it said is on stderr"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def _do(self, command: str, **given: Any) -> Any:
        self._process.stdin.write(json.dumps({"command": command, **given}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __call__(self, function: str, *args: Any) -> Any:
        """What a JavaScript function returns on the page, as JSON."""
        return self._do("evaluate", code=function, args=args)

    def load(self, workflow: dict[str, Any], name: str = "workflow") -> None:
        """Open a workflow, as the template browser does."""
        self._do("load", workflow=workflow, name=name)

    def template(self, pack: str, name: str) -> None:
        """Open a template in the template browser, by its card."""
        self._do("template", pack=pack, name=name)

    def covered(self) -> list[tuple[str, str]]:
        """Pairs of nodes, by id, that cover each other, once the sizes are settled."""
        return self._do("covered")

    def errors(self) -> list[str]:
        """What the page has reported as an error since this was asked last."""
        return self._do("errors")

    def run(self, app: bool = False) -> dict[str, Any]:
        """Press Run, of the app or of the graph, and wait: ``kind``, and ``type`` and ``message`` of an error."""
        return self._do("run", app=app)

    def app(self) -> list[str]:
        """Show the open template as an app; what its inputs say."""
        return self._do("app")

    def fill(self, selector: str, text: str) -> None:
        """Type into a field."""
        self._do("fill", selector=selector, text=text)

    def click(self, text: str) -> None:
        """Click the first thing with exactly this text."""
        self._do("click", text=text)

    def menu(self, node: str) -> None:
        """Open the menu of a node, a JavaScript expression, by a right click on its title."""
        x, y = self(
            f"() => {{ const {{ canvas, ds }} = window.app.canvas, [x, y] = {node}.pos, {{ left, top }} = "
            "canvas.getBoundingClientRect(); "
            "return [left + (x + 60 + ds.offset[0]) * ds.scale, top + (y - 15 + ds.offset[1]) * ds.scale]; }"
        )
        self._do("point", x=x, y=y, button="right")

    def choose(self, menu: str, entry: str) -> None:
        """Click an entry of a menu inside the menu that is open, both by exactly their texts."""
        self._do("choose", menu=menu, entry=entry)

    def scroll(self, selector: str, pixels: int) -> None:
        """Click an element, and turn the mouse's wheel over it."""
        self._do("scroll", selector=selector, pixels=pixels)

    def reload(self) -> None:
        """Load the page again; what only it knew is gone."""
        self._do("reload")

    def screenshot(self, path: Path) -> None:
        """Write a PNG of what is seen."""
        self._do("screenshot", path=str(path))

    def elsewhere(self) -> list[str]:
        """The addresses outside the server that the page asked for, in vain."""
        return self._do("elsewhere")

    def saved(self) -> dict[str, Any]:
        """The open workflow, as it is saved."""
        return self("() => JSON.parse(JSON.stringify(window.app.graph.serialize()))")

    def sent(self) -> dict[str, dict[str, Any]]:
        """What Run would send: each node's inputs, by id."""
        prompt = self("async () => (await window.app.graphToPrompt()).output")
        return {key: one["inputs"] for key, one in prompt.items()}

    def turn(self, node: str, **values: Any) -> None:
        """Turn a node's knobs as a user does, a value and its callback; ``node`` is a JavaScript expression."""
        self(
            f"(values) => Object.entries(values).forEach(([name, value]) => {{ const widget = {node}.widgets.find("
            "(one) => one.name === name); widget.value = value; widget.callback?.(value); })",
            values,
        )

    def until(self, look: str, holds: Callable[[Any], bool], seconds: float = 10) -> Any:
        """What the function ``look`` returns on the page, once it ``holds``."""
        end = time.monotonic() + seconds
        while not holds(found := self(look)):
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found

    def text(self) -> str:
        """All words that are seen outside the canvas."""
        return self("() => document.body.innerText")

    def close(self) -> None:
        """End the browser that this page started."""
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def playwright():
    """The environment of `driver.mjs`."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if shutil.which("node") is None or shutil.which("npm") is None or chromium is None:
        pytest.skip("no browser: node, npm and chromium are needed (CHROMIUM is the program)")
    found = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=True).stdout.strip()
    folder = os.environ.get("PLAYWRIGHT_CORE") or f"{found}/playwright-core"
    if not (Path(folder) / "index.mjs").is_file():
        pytest.skip("no playwright-core: npm install -g playwright-core, or set PLAYWRIGHT_CORE to its folder")
    return {"PLAYWRIGHT_CORE": folder, "CHROMIUM": chromium}


@pytest.fixture(params=["classic", "nodes2"])
def open_page(request, playwright):
    """A function that opens a server's page in one of the two renderers."""
    pages: list[Page] = []

    def open_page(server: Any) -> Page:
        pages.append(Page(f"http://127.0.0.1:{server.port}", request.param, playwright))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def one_page(request, playwright, server):
    """A page of the server with the tiny files, in one of the two renderers, for all tests of a module."""
    page = Page(f"http://127.0.0.1:{server.port}", request.param, playwright)
    yield page
    page.close()
