"""Klein Local or fal: runs one of two branches, and the other not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..remote.route import LOCAL, MODES, REMOTE, Route, choose
from . import model_files
from .base_loader import KleinBaseLoader
from .common import CATEGORY
from .messages import say

LOADED = {"transformer": "diffusion_model", "text_encoder": "text_encoder", "vae": "vae"}  # kind: input of the loader


class KleinRoute(io.ComfyNode):
    """Two lazy images in, the one of the branch taken out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinRoute",
            display_name="Klein Local or fal",
            category=CATEGORY,
            description="Takes the local or the remote picture; only that branch runs. auto decides by this machine.",
            search_aliases=["klein switch", "fallback", "remote"],
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="auto: local where the accelerator's memory holds the largest of the local branch's files "
                    "times 1.2, and all of them exist; else fal. The node says why.",
                ),
                io.Image.Input("local", optional=True, lazy=True, tooltip="The picture that this machine makes."),
                io.Image.Input("remote", optional=True, lazy=True, tooltip="The picture that fal makes."),
            ],
            outputs=[io.Image.Output(display_name="image")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def check_lazy_status(cls, mode: str, local: Tensor | None = None, remote: Tensor | None = None) -> list[str]:
        if mode == MODES[0] and not (local is None and remote is None):
            return []  # asked again after a branch has run and perhaps cost money: a change since then must not matter
        route = _route(mode, cls.hidden)
        say(cls.hidden.unique_id, [route.why])
        return [route.branch]

    @classmethod
    def execute(cls, mode: str, local: Tensor | None = None, remote: Tensor | None = None) -> io.NodeOutput:
        if (local is None) != (remote is None):
            return io.NodeOutput(remote if local is None else local)
        return io.NodeOutput({LOCAL: local, REMOTE: remote}[_route(mode, cls.hidden).branch])


def _route(mode: str, hidden: Any) -> Route:
    """The branch to take.

    Raises:
        ValueError: nothing is connected to it.
    """
    inputs = hidden.dynprompt.get_node(hidden.unique_id)["inputs"]
    sizes, missing = _local_files(hidden.dynprompt, inputs.get(LOCAL))
    route = choose(mode, _accelerator_memory(), sizes, missing)
    if not _is_link(inputs.get(route.branch)):
        raise ValueError(f"{route.why} Nothing is connected to {route.branch}; connect the picture that is made there.")
    return route


def _accelerator_memory() -> int | None:
    """Bytes; None on a machine that computes on its CPU."""
    device = comfy.model_management.get_torch_device()
    return None if device.type == "cpu" else int(comfy.model_management.get_total_memory(device))


def _local_files(graph: Any, link: Any) -> tuple[dict[str, int], list[str]]:
    """(bytes of each file that our loaders above a link put on the accelerator, names of those that do not exist).

    Both are empty where a name comes through a link, so that it is unknown before it is run.
    """
    loaders = [node["inputs"] for node in _above(graph, link) if node["class_type"] == KleinBaseLoader.__name__]
    if any(_is_link(inputs.get(name)) for inputs in loaders for name in LOADED.values()):
        return {}, []
    sizes: dict[str, int] = {}
    missing: dict[str, None] = {}  # each name once
    for inputs in loaders:
        for kind, entry in LOADED.items():
            name = str(inputs.get(entry))
            path = model_files.find(kind, name)
            if path is None:
                missing[name] = None
            elif not (kind == "text_encoder" and inputs.get("text_encoder_device") == "cpu"):
                sizes[name] = max(_size(path), sizes.get(name, 0))
    return sizes, list(missing)


def _above(graph: Any, link: Any) -> Iterator[dict[str, Any]]:
    """Every node of a ``DynamicPrompt`` whose outputs reach a link, each once."""
    open_links, seen = [link], set()
    while open_links:
        link = open_links.pop()
        if not _is_link(link) or link[0] in seen or not graph.has_node(link[0]):
            continue
        seen.add(link[0])
        node = graph.get_node(link[0])
        open_links += node["inputs"].values()
        yield node


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _size(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    return sum(part.stat().st_size for part in ([path] if path.is_file() else path.glob("*.safetensors")))
