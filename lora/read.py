"""A LoRA's file, or peft folder, as named tensors, metadata and peft's config; nothing in it is trusted."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights.header import StoredTensor, read_file_header
from .config import CONFIG_FILE, AdapterConfig, config_of_metadata, read_config
from .forms import roles
from .names import locate, parse
from .report import LoraError, printable

MAX_HEADER = 32_000_000  # bytes; a LoRA of ten thousand tensors has two million
MAX_TENSORS = 20_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
FIRST_BAD = {  # the bits of the first float that is not finite: infinity, or NaN where there is no infinity
    torch.float64: (torch.int64, "uint64", 0x7FF0 << 48),
    torch.float32: (torch.int32, "uint32", 0x7F80 << 16),
    torch.bfloat16: (torch.int16, "uint16", 0x7F80),
    torch.float16: (torch.int16, "uint16", 0x7C00),
    torch.float8_e5m2: (torch.int8, "uint8", 0x7C),
    torch.float8_e4m3fn: (torch.int8, "uint8", 0x7F),
}
SUFFIXES = (".safetensors", ".sft")  # in letters of either case, as ComfyUI lists them
ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # as peft and diffusers save them


class LoraFile(NamedTuple):
    """A LoRA as it lies on disk.

    Attributes:
        label: names the file in errors and reports.
        keys: list every key of the file.
        tensors: hold those of FLUX.2's modules.
        metadata: holds the texts of the safetensors header.
        config: holds peft's config, of the metadata or of the adapter_config.json beside the file.
        note: says in words what the reader left aside.
    """

    label: str
    keys: tuple[str, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: AdapterConfig
    note: str


def label_of(path: str | Path) -> str:
    """The name of a LoRA in errors and reports, with its folder's where the file's own says nothing.

    >>> label_of("face/adapter_model.safetensors")
    'face/adapter_model.safetensors'
    """
    path = Path(path)
    return f"{path.parent.name}/{path.name}" if path.name in ADAPTER_FILES else path.name or str(path)


def find_weights(path: str | Path) -> Path:
    """The .safetensors file of a LoRA: the file itself, or the one in a peft or diffusers folder.

    Usage: ``find_weights("my_adapter")`` gives ``Path("my_adapter/adapter_model.safetensors")``.

    Raises:
        LoraError: there is no such path, it is another kind of file, or the folder holds not exactly one such file.
    """
    path = Path(path)
    label = label_of(path)
    try:
        if path.is_dir():
            return _in_folder(path, label)
        exists = path.is_file()
    except OSError as error:
        raise LoraError(f"LoRA {printable(label)} cannot be read ({error.strerror}); give another path.") from error
    if not exists:
        raise LoraError(f"LoRA {label} does not exist; give the path of a .safetensors file, or of a peft folder.")
    if not _is_weights(path):
        raise LoraError(f"LoRA {label} is not a .safetensors file; convert it, other formats can run code.")
    return path


def _in_folder(folder: Path, label: str) -> Path:
    named = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    found = named or sorted(filter(_is_weights, folder.iterdir()))
    if len(found) != 1:
        count = f"{len(found)} .safetensors files" if found else "no .safetensors file"
        raise LoraError(f"LoRA {label} is a folder with {count}; give the file itself.")
    return found[0]


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def stamp(file: Path) -> tuple[object, ...]:
    """A value that changes with a file or the config beside it: path, size and time of each, and whose the config is.

    Usage: ``stamp(find_weights("style.safetensors")) == before``.
    """
    beside = file.with_name(CONFIG_FILE)
    stamps = []
    for one in (file, beside):
        if one.is_file():
            status = one.stat()
            stamps.append((os.fspath(one.absolute()), status.st_size, status.st_mtime_ns))
    return (*stamps, len(stamps) == 2 and _owns_config(file))


def read_lora(file: Path) -> LoraFile:
    """Read the file that `find_weights` found: ``read_lora(find_weights("style.safetensors")).keys``.

    Tensors are copied into memory. A map of the file would lock it on Windows, and reading a map of a file that was
    truncated meanwhile ends the process.

    Raises:
        LoraError: the file or its config is damaged or hostile, or holds what no LoRA does.
    """
    label = label_of(file)
    try:
        header, metadata = read_file_header(file, f"LoRA {label}", MAX_HEADER, MAX_TENSORS)
        _check(label, {name: entry.dtype for name, entry in header.items()})
        tensors = _read_tensors(file, label, {key: header[key] for key in _keys_of_flux_2(header)})
    except OSError as error:
        raise LoraError(f"LoRA {label} cannot be read ({error.strerror}); download it again.") from error
    except LoraError:
        raise
    except ValueError as error:
        raise LoraError(f"{str(error).removesuffix('.')}; download it again.") from error
    config, note = _config(file, label)
    return LoraFile(label, tuple(header), tensors, metadata, config or config_of_metadata(label, metadata), note)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    By the bits: as integers, those come last of each sign. One thread and no copy, since half a gigabyte is looked
    through before every first run.
    """
    if tensor.numel() == 0 or tensor.dtype not in FIRST_BAD:
        return True
    signed, unsigned, first_bad = FIRST_BAD[tensor.dtype]
    bits = tensor.contiguous().view(signed).numpy()
    sign = 1 << (8 * bits.itemsize - 1)
    return bool(bits.max() < first_bad and bits.view(unsigned).max() < first_bad + sign)


def _keys_of_flux_2(keys: Iterable[str]) -> list[str]:
    """Those of a known kind of LoRA whose module FLUX.2 has."""
    known = roles()
    return [key for key in keys if (parsed := parse(key, known)) and locate(parsed.module)]


def _read_tensors(file: Path, label: str, entries: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors that entries of a header describe, on the CPU."""
    tensors = {}
    with file.open("rb") as opened:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            dtype = DTYPES[entry.dtype]
            size = math.prod(entry.shape) * dtype.itemsize
            try:
                content = torch.empty(size, dtype=torch.uint8, device="cpu")
            except RuntimeError as error:
                raise LoraError(
                    f"LoRA {label} does not fit into memory, {printable(name)} takes {size} bytes; end other programs."
                ) from error
            opened.seek(entry.start)
            if opened.readinto(content.numpy().data) != size:
                raise LoraError(f"LoRA {label} was cut short while it was read; run again when it is complete.")
            tensors[name] = content.view(dtype).reshape(entry.shape)
    return tensors


def _check(label: str, dtypes: dict[str, str]) -> None:
    if not dtypes:
        raise LoraError(f"LoRA {label} holds no tensors; download it again.")
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise LoraError(f"LoRA {label} holds {name[:200]} as {dtype}; allowed are {', '.join(DTYPES)}.")


def _config(file: Path, label: str) -> tuple[AdapterConfig | None, str]:
    """The adapter_config.json beside a file, where it is the file's own."""
    beside = file.with_name(CONFIG_FILE)
    if not beside.is_file():
        return None, ""
    if not _owns_config(file):
        return None, (
            f"{CONFIG_FILE} beside it was not used, since it may belong to another file there; "
            "give the two a folder of their own"
        )
    return read_config(beside, label), ""


def _owns_config(file: Path) -> bool:
    """Whether an adapter_config.json beside a file can belong to no other."""
    return file.name in ADAPTER_FILES or sum(map(_is_weights, file.parent.iterdir())) == 1
