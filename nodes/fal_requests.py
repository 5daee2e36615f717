"""Klein fal Requests: what was submitted to fal and not collected, and what was spent."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..remote.journal import as_text, overview
from .common import CATEGORY
from .fal_edit import FOLDER
from .messages import SAYS, said

SESSION = datetime.now().astimezone()  # when ComfyUI loaded this pack


class KleinFalRequests(io.ComfyNode):
    """Reads the journal of Klein on fal, and nothing else."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinFalRequests",
            display_name="Klein fal Requests",
            category=CATEGORY,
            description="Lists what was submitted to fal and not collected, with ids, age and price, and what was "
            "spent. It only reads the journal.",
            search_aliases=["fal", "fal journal", "fal spending", "fal open requests"],
            inputs=[],
            outputs=[io.String.Output(display_name="table", tooltip="The list, as text.")],
            is_output_node=True,
            **SAYS,
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return float("nan")  # no two runs are alike, so nothing is taken from the cache

    @classmethod
    def execute(cls) -> io.NodeOutput:
        folder = Path(folder_paths.get_system_user_directory(FOLDER))
        text = as_text(overview(folder, SESSION, datetime.now().astimezone()))
        return io.NodeOutput(text, ui=said(text))
