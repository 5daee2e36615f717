"""Out of memory: told apart from other errors, and said in a sentence that names what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .words import first_line

# What PyTorch says where it has no exception of its own: on the CPU, on MPS, and in some drivers.
WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, or of Python itself, means that memory ran out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


@contextmanager
def memory_advice(lower: str) -> Iterator[None]:
    """Say what to lower when memory runs out inside; every other error passes::

        with memory_advice("lower image_size (1024x1024)"):
            ...

    Args:
        lower: ends the sentence of the error.

    Raises:
        torch.cuda.OutOfMemoryError: memory ran out on any device; hosts free their models on this error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise torch.cuda.OutOfMemoryError(f"memory ran out ({first_line(error)}); {lower}.") from error
