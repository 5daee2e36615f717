"""Routes of ComfyUI's server for the browser's modules. They read and compute, and change nothing.

ComfyUI's routes have no authentication, so none of ours writes, cancels or buys anything, or shows a key or a prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from server import PromptServer

ROOT = "/klein_cns"
LONGEST = 8000  # characters of the query; aiohttp's own limit of a line is near


def add_route(name: str, answer: Callable[[Mapping[str, Any]], Any]) -> None:
    """Add ``GET /klein_cns/NAME?values=JSON``, which answers with JSON.

    A ValueError is the asker's, and its sentence comes with status 400 as ``{"error": ...}``.

    Args:
        name: is unique among the routes.
        answer: takes the values, a JSON object, and returns what JSON can hold. It runs outside the server's own
            thread, and it checks the values as it would any input.
    """

    @PromptServer.instance.routes.get(f"{ROOT}/{name}")
    async def handle(request: web.Request) -> web.Response:
        try:
            found = await asyncio.to_thread(answer, _values(request.query.get("values", "{}")))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(found)


def _values(text: str) -> dict[str, Any]:
    if len(text) > LONGEST:
        raise ValueError(f"values has {len(text)} characters; allowed are {LONGEST}.")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError("values is no JSON object; give one, for example ?values={}.")
    return values
