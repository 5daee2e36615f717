"""Where the injected noise comes from: one CPU stream per image, seeded by the node's own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .params import MAX_SEED, checked_number

# Odd, so that k -> seed + k·STRIDE never repeats modulo 2^32, which is all that torch's CPU engine keeps of a seed.
STRIDE = 0x9E3779B9


def checked_batch_index(batch_index: Sequence[int] | None, batch: int) -> list[int]:
    """Position of each image in the batch it was first drawn in; None counts from 0 to batch - 1.

    >>> checked_batch_index(None, 3)
    [0, 1, 2]

    Raises:
        ValueError: there is not one whole number from 0 to 2^20 for each image.
    """
    if batch_index is None:
        return list(range(batch))
    index = [checked_number("batch_index", int(i) if float(i).is_integer() else i, 0, 2**20, True) for i in batch_index]
    if len(index) != batch:
        raise ValueError(f"batch_index has {len(index)} entries for a batch of {batch}; give one for each image.")
    return index


class NoiseStreams:
    """Independent white noise for each image of a batch.

    The seeds differ from the run's own (the initial noise's) by a multiple of ``STRIDE`` that counts the
    image and where the schedule starts: no stream repeats the initial noise, another image's, or, when a
    schedule is split in two under one seed, that of the other half.

    >>> NoiseStreams(7, [0, 1]).draw((2, 4, 8, 8), torch.device("cpu")).shape
    torch.Size([2, 4, 8, 8])

    Args:
        seed: starts the streams, 0 to 2^64 - 1.
        batch_index: gives the position of each image in the batch it was first drawn in.
        first_sigma: says where the schedule starts, in [0, 1].
        pin_memory: allows page-locked memory, which CUDA devices use.

    Raises:
        ValueError: the seed is out of range.
    """

    def __init__(
        self, seed: int, batch_index: Sequence[int], first_sigma: float = 1.0, pin_memory: bool = True
    ) -> None:
        seed = checked_number("seed", seed, 0, MAX_SEED, whole=True)
        self._pin_memory = pin_memory
        start = round((1.0 - first_sigma) * 2**16) * 2**12
        self._generators = [
            torch.Generator("cpu").manual_seed((seed + (1 + index + start) * STRIDE) % 2**64) for index in batch_index
        ]

    def draw(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The next float32 noise of ``shape`` [B, ...] on ``device``, without waiting for a CUDA device.

        Only pinned memory is copied asynchronously: PyTorch keeps it until the copy has ended. Pageable memory is free
        again when this returns, and a copy that still runs would read whatever comes next.
        """
        pinned = self._pin_memory and device.type == "cuda"
        white = torch.empty(tuple(shape), dtype=torch.float32, device="cpu", pin_memory=pinned)
        for image, generator in zip(white, self._generators, strict=True):
            image.normal_(generator=generator)
        return white.to(device, non_blocking=pinned)
