"""The header of a safetensors file, read and checked before any tensor is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library too
MAX_TENSORS = 1_000_000  # no model has as many
MAX_NAME = 200  # characters of a name in an error
MAX_AXES, MAX_LENGTH = 8, 2**48  # of a shape; a larger shape would overflow the size computation
FOREIGN_STARTS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a PyTorch or zip archive",
    b"\x80": "a Python pickle",
    b"<": "a web page, saved in place of the file",
    b"version ": "a Git LFS pointer in place of the file",
}
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class StoredTensor(NamedTuple):
    """A tensor as a header describes it.

    Attributes:
        dtype: names the type as safetensors writes it, ``BF16``.
        shape: gives the stored shape; packed weights store fewer columns.
        start: counts the bytes of the file before its data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0


def read_file_header(
    path: Path, label: str, max_header: int = MAX_HEADER, max_tensors: int = MAX_TENSORS
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file; nothing but its header is read.

    Args:
        path: names the file.
        label: names the file in an error.
        max_header: bounds the header's bytes; a larger header is refused unread.
        max_tensors: bounds the tensors; more are refused before any is looked at.

    Raises:
        ValueError: the file is missing, empty, truncated, damaged or not a safetensors file; the message names it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if length <= min(max_header, size - 8) else b""
    except OSError as error:
        raise ValueError(f"{label} cannot be read ({error.strerror}).") from error
    if not size:
        raise ValueError(f"{label} is empty.")
    if max_header < length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"{label} has a header of {length} bytes; at most {max_header} are read.")
    if size < 8 or length > MAX_HEADER:
        what = next((words for sign, words in FOREIGN_STARTS.items() if start.startswith(sign)), None)
        raise ValueError(f"{label} is {what or 'not a safetensors file'}.")
    if len(text) < length:
        raise ValueError(f"{label} is truncated: its header takes {8 + length} bytes, the file has {size}.")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is not a safetensors file: its header is not JSON.") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{label} is not a safetensors file: its header is not a table of tensors.")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{label} is damaged: its metadata is not a table of texts.")
    if len(entries) > max_tensors:
        raise ValueError(f"{label} has {len(entries)} tensors; at most {max_tensors} are read.")
    for name, entry in entries.items():
        if not _is_tensor(entry):
            raise ValueError(f"{label} is damaged: the header's entry {name[:MAX_NAME]} describes no tensor.")
    _check_offsets(label, entries, size - 8 - length)
    data = 8 + length
    stored = {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    return stored, metadata


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return False
    if len(shape) > MAX_AXES or max(shape, default=0) > MAX_LENGTH:
        return False
    bits = BITS.get(entry["dtype"])
    return bits is None or math.prod(shape) * bits == 8 * (offsets[1] - offsets[0])


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _check_offsets(label: str, entries: Mapping[str, Any], size: int) -> None:
    """Tensors must fill the data of a file without a gap or an overlap, as the safetensors library demands."""
    spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    needed = max((end for _, end, _ in spans), default=0)
    if needed > size:
        raise ValueError(f"{label} is truncated: its tensors take {needed} bytes, the file has {size} of them.")
    end = 0
    for start, stop, name in spans:
        if start != end:
            fault = "overlaps another" if start < end else "leaves a gap before it"
            raise ValueError(f"{label} is damaged: in its data {name[:MAX_NAME]} {fault}.")
        end = stop
    if end != size:
        raise ValueError(f"{label} is damaged: {size - end} bytes follow its last tensor.")
