"""Solvers, schedules, churn and guidance at few steps, on targets whose denoiser is exact (`mixtures.py`).

    python benchmarks/fewsteps.py [-o FOLDER] [--quick] [--no-comfyui]

Prints Markdown tables and, with -o, writes them as tables.md beside a plot fewsteps.png. Everything is measured
against the fine ODE of the same noise: ED the energy distance in whitened space, W the error of the band powers, dev
the relative rms deviation; each as mean ± standard deviation over seeds. Calls count every evaluation of the guided
prediction, so that samplers of several evaluations a step take fewer steps. klein's schedule is that of 4096 tokens,
1024x1024.

Where a ComfyUI is found (`COMFYUI_PATH`, or ``~/comfy/ComfyUI``), every sampler it has runs on every schedule it has,
in its own Python, and the best of them are repeated on all seeds. Left out are the CFG++ samplers, which need another
guidance, those that choose their own steps, and what is the same as another: ``_gpu`` and ``ddim``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import mixtures  # noqa: E402
from mixtures import Mixture, Target  # noqa: E402

TOKENS = 4096
TICKS = (6, 8, 12, 16, 28, 50)
SHIFT = 2.02  # of ComfyUI's own schedules for FLUX.2
LEFT_OUT = ("ddim", "dpm_adaptive")
MAIN = ("pixels", "latents", "memorised", "field")
GUIDED = ("pixels, w 3", "latents, w 3", "memorised, w 3")
METRICS = ("ED", "W", "dev")


class Problem(NamedTuple):
    """A target, the fine ODE's result for the noise of each seed, and the whitening of its space."""

    target: Target
    truths: dict[int, Tensor]
    white: Tensor

    @classmethod
    def of(cls, target: Target, seeds: Iterable[int], count: int) -> Problem:
        truths = {seed: mixtures.fine_ode(target.denoised, mixtures.noise(count, seed)) for seed in seeds}
        return cls(target, truths, mixtures.whitening(target.everything))

    def measure(self, sample: Callable[[Callable[..., Tensor], Tensor, int], Tensor]) -> dict[str, list[float]]:
        """Metrics and calls for each seed of ``sample(model, noise, seed) -> x0``."""
        found: dict[str, list[float]] = {name: [] for name in (*METRICS, "calls")}
        for seed, truth in self.truths.items():
            calls = 0

            def model(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
                nonlocal calls
                calls += 1
                return self.target.denoised(x, sigma)

            x = sample(model, mixtures.noise(len(truth), seed), seed)
            found["ED"].append(mixtures.energy_distance(x, truth, self.white))
            found["W"].append(mixtures.band_error(x, truth))
            found["dev"].append(mixtures.deviation(x, truth))
            found["calls"].append(calls)
        return found


class Ours(NamedTuple):
    """A run of this pack's sampler."""

    solver: str
    schedule: str
    steps: int
    churn: float = 0.0
    colour: str = "unguided"  # matrix; or guided, white

    def __call__(self, model: Callable[..., Tensor], noise: Tensor, seed: int) -> Tensor:
        from klein_cns.klein.schedules import SCHEDULES
        from klein_cns.sampler import CNSParams, sample_cns, shipped_progress

        white = {"gamma_divider": 50.0, "power_gamma": 0.1, "alpha_tilt_start": 0.0, "alpha_tilt_end": 0.0}
        params = CNSParams(s_churn=self.churn, **(white if self.colour == "white" else {}))
        progress = shipped_progress("sit_xl2_cfg_1.5") if self.colour == "guided" else None
        sigmas = torch.from_numpy(SCHEDULES[self.schedule](self.steps, TOKENS))
        return sample_cns(
            model, noise, sigmas, disable=True, params=params, solver=self.solver, progress=progress, seed=seed
        )

    def label(self) -> str:
        churn = f", churn {self.churn:g} {self.colour}" if self.churn else ""
        return f"{self.solver}, {self.schedule}{churn}"


# ComfyUI's samplers: this part runs in ComfyUI's own Python.


def comfyui_worker(folder: str) -> None:
    """Reads ``job.pt`` in the folder and prints a row for each problem, budget, sampler and schedule as JSON."""
    sys.path.insert(0, os.getcwd())
    sys.argv = ["fewsteps", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_sampling
    import comfy.samplers

    class Sampling(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(SimpleNamespace(sampling_settings={"shift": SHIFT}))
    job = torch.load(Path(folder, "job.pt"), weights_only=True)
    problems = [
        Problem(Target(name, Mixture(*everything), Mixture(*known), guidance, error), truths, white)
        for name, everything, known, guidance, error, truths, white in job["problems"]
    ]

    def sigmas_of(sampler: str, schedule: str, steps: int) -> Tensor:
        if schedule in job["sigmas"]:
            return job["sigmas"][schedule][steps]
        drop = sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
        sigmas = comfy.samplers.calculate_sigmas(sampling, schedule, steps + drop)
        return torch.cat([sigmas[:-2], sigmas[-1:]]) if drop else sigmas

    def run(sampler: str, sigmas: Tensor) -> Callable[[Callable[..., Tensor], Tensor, int], Tensor]:
        def sample(model: Callable[..., Tensor], noise: Tensor, seed: int) -> Tensor:
            def guider(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
                return model(x, sigma)

            guider.cfg = 1.0
            guider.inner_model = SimpleNamespace(model_sampling=sampling)
            guider.model_patcher = SimpleNamespace(get_model_object=lambda name: sampling, model=guider)
            torch.manual_seed(seed)
            how = {"seed": seed, "model_options": {}}
            return comfy.samplers.sampler_object(sampler).sample(
                guider, sigmas, how, None, noise, torch.zeros_like(noise), disable_pbar=True
            )

        return sample

    def calls(sampler: str, schedule: str, steps: int) -> float:
        """Of a run; infinite where the sampler or the schedule cannot do so few steps."""
        count = 0

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return x / 2

        try:
            run(sampler, sigmas_of(sampler, schedule, steps))(model, torch.ones(1, *mixtures.SHAPE), 0)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError):
            return math.inf
        return count

    samplers = [
        name
        for name in comfy.samplers.SAMPLER_NAMES
        if not (name in LEFT_OUT or name.endswith("_gpu") or "cfg_pp" in name)
    ]
    schedules = [*comfy.samplers.SCHEDULER_NAMES, *job["sigmas"]]
    rows = []
    for budget in job["budgets"]:
        for sampler, schedule in job["chosen"] or [(one, other) for one in samplers for other in schedules]:
            steps = next((n for n in range(budget, 1, -1) if calls(sampler, schedule, n) <= budget), None)
            if steps is None:
                continue
            for problem in problems:
                found = problem.measure(run(sampler, sigmas_of(sampler, schedule, steps)))
                rows.append([problem.target.name, budget, sampler, schedule, found])
    print(json.dumps(rows))


def comfyui(
    place: tuple[Path, Path], problems: Sequence[Problem], budgets: Sequence[int], chosen: Sequence[Sequence[str]] = ()
) -> list[list[Any]]:
    """[target, budget, sampler, schedule, metrics] of every sampler on every schedule, or of the ``chosen`` pairs."""
    from klein_cns.klein.schedules import flux2_sigmas

    def tensors(mixture: Mixture) -> list[Tensor]:
        return [mixture.weights, mixture.means, mixture.bases, mixture.variances, mixture.rest]

    job = {
        "problems": [
            [t.name, tensors(t.everything), tensors(t.known), t.guidance, t.error, p.truths, p.white]
            for p in problems
            for t in [p.target]
        ],
        "budgets": list(budgets),
        "chosen": [list(pair) for pair in chosen],
        "sigmas": {"flux2": {n: torch.from_numpy(flux2_sigmas(n, TOKENS)) for n in range(1, max(budgets) + 1)}},
    }
    path, python = place
    with tempfile.TemporaryDirectory() as folder:
        torch.save(job, Path(folder, "job.pt"))
        command = [str(python), str(Path(__file__)), "--comfyui-worker", folder]
        done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# Tables


def cell(values: list[float], metric: str) -> str:
    digits = {"ED": 0, "W": 4, "dev": 3}[metric]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f}±{spread:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[tuple[Sequence[object], Sequence[dict[str, list[float]]]]]) -> str:
    """Markdown: the names of each row, then ED / W / dev for each target."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for names, found in rows:
        cells = [" / ".join(cell(one[metric], metric) for metric in METRICS) for one in found]
        lines.append("| " + " | ".join([*map(str, names), *cells]) + " |")
    return "\n".join(lines)


def measured(problems: dict[str, Problem], names: Sequence[str], runs: Iterable[Ours]) -> list[tuple[list[Any], list]]:
    """A row for each run: what it is and its steps, then its metrics on the problems of those names."""
    return [([run.label(), run.steps], [problems[name].measure(run) for name in names]) for run in runs]


def best(rows: list[list[Any]], metric: str) -> list[Any]:
    """The row with the least |metric| on its first seed."""
    return min(rows, key=lambda row: abs(row[4][metric][0]) if math.isfinite(row[4][metric][0]) else math.inf)


def compromise(rows: list[list[Any]]) -> list[Any]:
    """The row whose ED, W and dev are least in product."""
    return min(rows, key=lambda row: math.prod(max(abs(row[4][metric][0]), 1e-6) for metric in METRICS))


def comfyui_tables(place: tuple[Path, Path], problems: list[Problem], budgets: Sequence[int]) -> str:
    """For each budget and target the best of ComfyUI by each metric, repeated on every seed."""
    first = [p._replace(truths=dict(list(p.truths.items())[:1])) for p in problems]
    rows, names = comfyui(place, first, budgets), [p.target.name for p in problems]
    lines = []
    for budget in budgets:
        chosen: dict[tuple[str, str], list[str]] = {}
        for name in names:
            here = [row for row in rows if row[0] == name and row[1] == budget]
            for why, row in (*((m, best(here, m)) for m in METRICS), ("all three", compromise(here))):
                chosen.setdefault((row[2], row[3]), []).append(f"{why} on {name}")
        again = comfyui(place, problems, [budget], list(chosen))
        for (sampler, schedule), why in chosen.items():
            found = {row[0]: row[4] for row in again if row[2:4] == [sampler, schedule]}
            lines.append(([f"{sampler}, {schedule}", budget, "; ".join(why)], [found[name] for name in names]))
    return table(["ComfyUI's sampler, schedule", "calls, at most", "the best by", *names], lines)


def plot(
    rows: Sequence[tuple[Sequence[Any], Sequence[dict[str, list[float]]]]], names: Sequence[str], path: Path
) -> None:
    """dev against calls, one panel a target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.1), sharey=True, layout="constrained")
    for k, (axis, name) in enumerate(zip(axes, names, strict=True)):
        for label in dict.fromkeys(row[0][0] for row in rows):
            points = [(row[0][1], row[1][k]["dev"]) for row in rows if row[0][0] == label]
            spread = [statistics.stdev(dev) if len(dev) > 1 else 0.0 for _, dev in points]
            axis.errorbar([n for n, _ in points], [statistics.mean(dev) for _, dev in points], spread, marker="o",
                          markersize=3, linewidth=1, label=label)  # fmt: skip
        axis.set(title=name, xlabel="calls", xscale="log", yscale="log", xticks=TICKS, xticklabels=TICKS)
        axis.minorticks_off()
    axes[0].set_ylabel("deviation from the fine ODE")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder for tables.md and fewsteps.png")
    parser.add_argument("--quick", action="store_true", help="one seed, few samples, no ComfyUI")
    parser.add_argument("--no-comfyui", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--comfyui-worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.comfyui_worker:
        comfyui_worker(args.comfyui_worker)
        return
    seeds, count = ((1,), 64) if args.quick else ((1, 2, 3), 128)
    targets = mixtures.targets()

    def problem(name: str, guidance: float | None = None, error: float = 0.0) -> Problem:
        return Problem.of(targets[name].guided(guidance).erring(error), seeds, count)

    problems = {name: problem(name) for name in MAIN} | {f"{name}, w 3": problem(name, 3.0) for name in MAIN[:3]}
    curves = {
        ("euler", "flux2"): (12, 16, 28, 50),
        ("sde_2m", "flux2"): (8, 12, 16, 28),
        ("sde_2m", "log_snr"): (6, 8, 12, 16),
        ("sde_3m", "log_snr"): (6, 8, 12, 16, 28),
    }
    runs = [Ours(*curve, n) for curve, steps in curves.items() for n in steps]
    runs += [Ours("euler", "log_snr", 12), Ours("sde_3m", "flux2", 12)]
    main_rows = measured(problems, MAIN + GUIDED, runs)
    unguided = [(names, found[: len(MAIN)]) for names, found in main_rows]
    guided = [(names, found[len(MAIN) :]) for names, found in main_rows]
    parts: list[str] = []

    def tell(title: str, part: str) -> None:
        parts.append(f"### {title}\n\n{part}\n")
        print(parts[-1], flush=True)

    tell("Unguided", table(["solver, schedule", "steps", *MAIN], unguided))
    tell("Guidance 3", table(["solver, schedule", "steps", *GUIDED], guided))

    for guidance in (1.0, 5.0):
        names = [f"{name}, w {guidance:g}" for name in MAIN[:2]]
        problems |= {key: problem(name, guidance) for key, name in zip(names, MAIN, strict=False)}
    names = [f"{name}, w {guidance}" for guidance in (1, 5) for name in MAIN[:2]]
    few = [Ours("euler", "flux2", 28), Ours("sde_3m", "flux2", 12), Ours("sde_3m", "log_snr", 12)]
    tell("Guidance 1 and 5", table(["solver, schedule", "steps", *names], measured(problems, names, few)))

    problems |= {f"{name}, erring": problem(name, error=0.1) for name in MAIN[:2]}
    erring = {
        f"{name}, against the exact": problems[f"{name}, erring"]._replace(truths=problems[name].truths)
        for name in MAIN[:2]
    }
    names = [f"{name}, erring" for name in MAIN[:2]] + list(erring)
    churned = [Ours("sde_3m", "log_snr", 12, churn) for churn in (0.5, 1.0)] + [Ours("euler", "flux2", 28, 0.5)]
    rows = measured(problems | erring, names, few + churned)
    tell("A denoiser with smooth errors of 0.1", table(["solver, schedule", "steps", *names], rows))

    runs = [
        Ours("euler", "flux2", steps, churn)
        for steps, churns in ((12, (0.5, 1.0)), (28, (0.25, 0.5, 1.0)), (50, (0.25, 0.5)))
        for churn in churns
    ]
    runs += [Ours("sde_3m", "log_snr", steps, churn) for steps in (12, 28) for churn in (0.5, 1.0)]
    runs += [Ours("euler", "flux2", 28, 0.5, colour) for colour in ("guided", "white")]
    runs += [Ours("sde_3m", "log_snr", 12, 0.5, colour) for colour in ("guided", "white")]
    names = [*MAIN[:3], *GUIDED[:2]]
    tell("Churn", table(["solver, schedule, churn and matrix", "steps", *names], measured(problems, names, runs)))

    if not (args.quick or args.no_comfyui):
        sys.path.insert(0, str(ROOT / "tests"))
        from comfy_host import find_comfyui

        place = find_comfyui()
        if place is None:
            print("No ComfyUI was found; its samplers are left out.", file=sys.stderr)
        else:
            tell("ComfyUI's own samplers", comfyui_tables(place, [problems[n] for n in MAIN[:3]], (12, 8)))

    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "tables.md").write_text("\n".join(parts))
        plot([row for row in main_rows if row[0][0] in [f"{a}, {b}" for a, b in curves]], MAIN + GUIDED[:1],
             args.output / "fewsteps.png")  # fmt: skip


if __name__ == "__main__":
    main()
