"""Words shown on a node while and after it runs."""

from __future__ import annotations


def show(unique_id: str, text: str) -> None:
    """Show a line on the node, in both renderers."""
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, unique_id)
