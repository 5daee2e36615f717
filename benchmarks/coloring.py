"""Cost of colouring a step's noise: against drawing it, and against a complex FFT of the packed grid.

    python benchmarks/coloring.py [--device cuda] [--threads N] [--markdown]

"plain" is the straightforward way: ``fft2`` of the packed latent, a gain, ``ifft2``, the real part, divided by
its measured standard deviation. Times are medians of interleaved runs, in milliseconds. Peak is the
most memory alive at once, in latents, the white noise that comes in included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from klein_cns.klein.sizes import latent_size
from klein_cns.sampler import CNSParams, color_noise, shipped_progress, spectral_gain
from klein_cns.sampler.noise import NoiseStreams

SIZES = {"1 MP (1024x1024)": (1024, 1024), "2016x1152": (2016, 1152)}
BATCHES = (1, 4)
CHANNELS = 128


def plain_coloring(white: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The straightforward way, on the packed grid."""
    colored = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
    return colored / colored.std()


def medians(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each; taken in turns, so that a drift of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 3):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch had allocated at once during a call, beyond those before it."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"{name}, torch {torch.__version__}\n")
    print("| latent | batch | draw | colour | plain | colour / draw | plain / colour | peak, latents |")
    print("|---|---|---|---|---|---|---|---|")
    for label, (width, height) in SIZES.items():
        h, w = latent_size(width, height)
        row = shipped_progress().at(0.5, 32)
        gain = spectral_gain(CNSParams(), row, -0.2, 2 * h, 2 * w).to(device)
        half = spectral_gain(CNSParams(), row, -0.2, h, w)
        packed = torch.cat([half, half[:, 1 : (w + 1) // 2].flip(1)], 1).to(device)
        for batch in BATCHES:
            shape = (batch, CHANNELS, h, w)
            streams = NoiseStreams(0, range(batch))
            white = streams.draw(shape, device)
            found = medians(
                {
                    "draw": lambda: streams.draw(shape, device),  # noqa: B023
                    "colour": lambda: color_noise(white, gain, 2),  # noqa: B023
                    "plain": lambda: plain_coloring(white, packed),  # noqa: B023
                },
                device,
                args.repeats,
            )
            peak = 1 + peak_bytes(lambda: color_noise(white, gain, 2), device) / (white.numel() * 4)  # noqa: B023
            print(
                f"| {label} | {batch} | {found['draw']:.2f} | {found['colour']:.2f} | {found['plain']:.2f} "
                f"| {found['colour'] / found['draw']:.2f} | {found['plain'] / found['colour']:.2f} | {peak:.2f} |"
            )


if __name__ == "__main__":
    main()
