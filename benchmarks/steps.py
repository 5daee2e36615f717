"""What a step costs outside the model: our loop against ComfyUI's Euler, and against another pack's CNS sampler.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python benchmarks/steps.py [--peer FOLDER] [--device cuda] [--threads N]

Every loop runs 28 steps at 1 MP on a model that gives back one tensor, so that nothing but the loop is timed. Runs
are taken in turns, in a new order each time; figures are medians of milliseconds a step, by the wall clock and by the
processor. ``--peer`` is a clone of IIs-fanta/ComfyUI-CNS-Sampler-CHENGOU, whose loop is called as it stands.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from on_comfyui import answer, import_pack, worker

STEPS = 28
SHAPE = (128, 64, 64)  # of one latent at 1024 x 1024
BATCHES = (1, 4)


def loops(peer: str) -> dict[str, Callable[..., Any]]:
    """Each loop in k-diffusion's calling convention; the seed is the run's own."""
    from comfy.k_diffusion.sampling import sample_euler
    from klein_pack.sampler import CNSParams, sample_cns

    def ours(solver: str, **values: Any) -> Callable[..., Any]:
        params = CNSParams(**values)
        return lambda *args, **options: sample_cns(*args, **options, params=params, solver=solver, patch_size=2, seed=7)

    found = {
        "ComfyUI's euler": sample_euler,
        "ours, CNS off": ours("euler", enable_cns=False),
        "ours, sde_3m, CNS off": ours("sde_3m", enable_cns=False),
        "ours, CNS": ours("euler"),
        "ours, sde_3m, CNS": ours("sde_3m"),
    }
    if peer:
        import importlib.util

        spec = importlib.util.spec_from_file_location("peer", f"{peer}/nodes.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        options = {
            "gamma_matrix": module._load_bundled_gamma(), "power_gamma": 0.75, "gamma_divider": 1.73,
            "alpha_tilt_start": 0.15, "alpha_tilt_end": -0.5, "alpha_use_fnorm": True, "alpha_exp_interp": True,
            "energy_scale": 0.98,
        }  # fmt: skip
        found["CHENGOU's CNS"] = lambda *args, **given: module.sample_euler_cns(*args, **given, **options)
    return found


def measure(peer: str, device: str, threads: str, repeats: str) -> dict[str, Any]:
    """Milliseconds a step of each loop, (wall, processor), for each batch."""
    import_pack(*([] if device == "cuda" else ["--cpu"]))
    import torch
    from klein_pack.klein.schedules import flux2_sigmas

    torch.set_num_threads(int(threads))
    sigmas = torch.from_numpy(flux2_sigmas(STEPS, SHAPE[1] * SHAPE[2])).to(device)
    table, turns = {}, random.Random(0)
    for batch in BATCHES:
        x, x0 = torch.randn(2, batch, *SHAPE, device=device)
        times: dict[str, list[tuple[float, float]]] = {}
        for turn in range(int(repeats) + 1):
            runs = list(loops(peer).items())
            turns.shuffle(runs)
            for name, loop in runs:
                if device == "cuda":
                    torch.cuda.synchronize()
                wall, processor = time.perf_counter(), time.process_time()
                loop(lambda x, sigma, **_: x0, x, sigmas, extra_args={}, disable=True)  # noqa: B023
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    spent = (time.perf_counter() - wall, time.process_time() - processor)
                    times.setdefault(name, []).append(spent)
        for name in loops(peer):
            spent = times[name]
            table.setdefault(name, []).append(
                [1e3 / STEPS * statistics.median(kind) for kind in zip(*spent, strict=True)]
            )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    return {"where": f"{where}, torch {torch.__version__}", "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--repeats", default="15")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return answer({"measure": lambda text: measure(*json.loads(text))}, *args.worker)
    found = worker(__file__, "measure", json.dumps([args.peer, args.device, args.threads, args.repeats]))
    print(f"{found['where']}; milliseconds a step, wall (processor)\n")
    print(f"| loop | {' | '.join(f'batch {batch}' for batch in BATCHES)} |\n|---|{'---|' * len(BATCHES)}")
    for name, cells in found["table"].items():
        print(f"| {name} | {' | '.join(f'{wall:.2f} ({processor:.2f})' for wall, processor in cells)} |")


if __name__ == "__main__":
    main()
