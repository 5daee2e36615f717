"""Words on a node: a line while it runs, and what it said once it has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

# For the Schema of a node that says something: its words come again with a cached run (ComfyUI 0.19 and newer).
_AGAIN = "has_intermediate_output"
SAYS: dict[str, Any] = {_AGAIN: True} if _AGAIN in {field.name for field in fields(io.Schema)} else {}


def show(unique_id: str, text: str) -> None:
    """Show a line on the node while it runs. A reload removes it; `said` keeps a text that must be read later."""
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, unique_id)


def said(*lines: str, **numbers: Any) -> dict[str, list[Any]]:
    """The ``ui`` of a node's output that ``web/said.js`` shows on the node and saves with the workflow.

    A node that may say something returns this in every run: without lines it clears what an earlier run said.

    Args:
        lines: are shown as they are.
        numbers: go to other modules of the browser under their names; None is left out.
    """
    return {"text": list(lines), **{name: [value] for name, value in numbers.items() if value is not None}}


def say(unique_id: str, lines: Sequence[str], **numbers: Any) -> None:
    """Show on a node what `said` would, while another node is executed. A run from the cache does not repeat it."""
    from server import PromptServer

    server = PromptServer.instance
    if server.client_id is None:
        return  # nobody looks, as with ComfyUI's own messages; without this it would go to every open page
    ids = {"node": unique_id, "display_node": unique_id, "prompt_id": server.last_prompt_id}
    server.send_sync("executed", {**ids, "output": said(*lines, **numbers)}, server.client_id)
