"""Which files hold a component of a model, and their headers: a single file, or the shards of a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from .header import StoredTensor, read_file_header


class Header(NamedTuple):
    """The headers of one file, or of all shards of a folder.

    ``metadata`` is the files' own; a component of a diffusers folder also has ``is_distilled`` of its model_index.json.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def label(self) -> str:
        """The file's name; for anything but a .safetensors file, its folder's name too."""
        return _label(self.path)


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that hold one component: the file itself, or the shards in a folder.

    Usage: ``weight_files("klein/transformer")``.

    Raises:
        ValueError: there is no file, a shard is missing, or several sets of weights lie side by side.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{_label(path)} does not exist.")
    index = _index(path)
    if index:
        return _shards(path, sorted(set(index.values())))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{_label(path)} is a folder without a .safetensors file.")
    numbered = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", file.name) for file in files]
    first = numbered[0]
    if first and all(found and (found[1], found[3]) == (first[1], first[3]) for found in numbered):
        return _shards(path, [f"{first[1]}-{i + 1:05}-of-{first[3]}.safetensors" for i in range(int(first[3]))])
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{_label(path)} holds several sets of weights ({names}), of which one must be kept.")
    return files


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, or the merged ones of a folder's shards; no tensor is read.

    Usage: ``read_header("klein.safetensors").tensors["img_in.weight"].shape``.

    Args:
        path: names a file, or a folder such as ``transformer`` of a diffusers folder.

    Raises:
        ValueError: a file is missing, empty, truncated, damaged or not a safetensors file; the message names it.
    """
    path = Path(path)
    tensors: dict[str, StoredTensor] = {}
    metadata = _model_index(path)
    for file in weight_files(path):
        label = _label(path) if file == path else f"{_label(path)}/{file.name}"
        found, extra = read_file_header(file, label)
        twice = next((name for name in found if name in tensors), None)
        if twice:
            raise ValueError(f"{label} holds {twice}, which another shard holds too.")
        tensors |= found
        metadata |= extra
    lost = [name for name in _index(path) if name not in tensors]
    if lost:
        raise ValueError(f"{_label(path)} lacks {listed(lost)}, which its index names.")
    return Header(path, tensors, metadata)


def _label(path: Path) -> str:
    return path.name if path.suffix == ".safetensors" else f"{path.parent.name}/{path.name}"


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, of the index in a folder; empty where there is none."""
    indices = sorted(path.glob("*.safetensors.index.json"), key=lambda file: len(file.name))
    if not indices:
        return {}
    problem = f"{_label(path)}/{indices[0].name} is not an index of shards"
    try:
        index = json.loads(indices[0].read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{problem}.") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{problem}.")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard or re.search(r"[/\\:\0]", shard) or shard.startswith("."):
            raise ValueError(f"{problem}: {shard!r} is not a file name.")
    return shards


def _shards(folder: Path, names: list[str]) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{_label(folder)} lacks {len(missing)} of {len(names)} shards ({listed(missing)}).")
    return [folder / name for name in names]


def _model_index(path: Path) -> dict[str, str]:
    """``is_distilled`` of the model_index.json above a component, as metadata."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        try:
            index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(index, dict) and isinstance(index.get("is_distilled"), bool):
            return {"is_distilled": str(index["is_distilled"]).lower()}
    return {}


def listed(names: list[str], most: int = 3) -> str:
    """The first names, and dots where there are more.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
