"""What acceleration costs: calls of the model, and the deviation from the same run in full, on exact denoisers.

    python benchmarks/acceleration.py -o figures.md

The targets are those of ``mixtures.py``. A network's predictions are never exact, and guidance multiplies their
difference: ``erring`` gives each of the two predictions a smooth error of its own, as a velocity with a relative error
of `ERROR` makes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from klein_cns.klein import flux2_sigmas
from klein_cns.sampler import CNSParams, sample_cns
from klein_cns.sampler.acceleration import Accelerator, Plan, plan
from mixtures import Target, deviation, noise, smooth_error, targets
from torch import Tensor

TOKENS = 4096  # of klein's schedule, 1 MP
COUNT = 96  # pictures of a seed
SEEDS = (1, 2)
ERROR = 0.05
OTHER = 0.15  # relative deviation above which a picture counts as another one
GUIDANCE = (1.0, 3.0, 5.0)
COLUMNS = ("pixels", "latents", "field", "latents, erring")
TITLE = " | ".join(COLUMNS)


class Case(NamedTuple):
    """A run in full that the levels are compared with."""

    steps: int
    guidance: float
    solver: str
    churn: float


def cases() -> list[Case]:
    """Every combination; with 12 steps no level does anything."""
    ways = [("euler", 0.0), ("euler", 0.5), ("sde_2m", 0.0), ("sde_2m", 0.5)]
    return [Case(steps, w, *way) for way in ways for w in GUIDANCE for steps in (12, 20, 28, 50)]


def run(target: Target, erring: bool, case: Case, level: str, seed: int) -> tuple[Tensor, Plan]:
    """[COUNT, 3, 16, 16] at the end of a run, and its plan."""
    sigmas = torch.from_numpy(flux2_sigmas(case.steps, TOKENS))
    made = plan(level, sigmas, case.guidance, case.solver)
    accelerator = Accelerator(made)
    error = smooth_error(ERROR) if erring else None

    def conditional(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = target.known.denoised(x, sigma)
        return x0 if error is None else x0 + error(x, sigma)

    def unconditional(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = target.everything.denoised(x, sigma)
        return x0 if error is None else x0 + error(x.flip(-1), sigma)  # another error of the same size

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        known = conditional(x, sigma)
        if case.guidance == 1:
            return known
        other = accelerator.unconditional(known, lambda: unconditional(x, sigma))
        return other + case.guidance * (known - other)

    params = CNSParams(enable_cns=case.churn > 0, s_churn=case.churn)
    how = {"disable": True, "params": params, "solver": case.solver, "seed": seed, "accelerator": accelerator}
    return sample_cns(model, noise(COUNT, seed), sigmas, **how), made


def compare(found: dict[str, Target], case: Case, levels: list[str]) -> list[str]:
    """A row of the table for each level."""
    cells: dict[str, list[str]] = {level: [] for level in levels}
    plans = {}
    for column in COLUMNS:
        name, erring = column.split(",")[0], "erring" in column
        full = torch.cat([run(found[name], erring, case, "none", seed)[0] for seed in SEEDS])
        for level in levels:
            parts = [run(found[name], erring, case, level, seed) for seed in SEEDS]
            plans[level] = parts[0][1]
            cells[level].append(_cell(torch.cat([x for x, _ in parts]), full))
    calls = case.steps * (2 if case.guidance != 1 else 1)
    start = f"| {case.solver} | {case.churn:g} | {case.guidance:g} | {case.steps}"
    return [f"{start} | {level} | {plans[level].calls} of {calls} | {' | '.join(cells[level])} |" for level in levels]


def _cell(x: Tensor, full: Tensor) -> str:
    """The deviation over all pictures, that of the middle one, and how many of a thousand became another."""
    if torch.equal(x, full):
        return "0"
    each = (x - full).flatten(1).square().mean(1).sqrt() / full.std()
    others = int((each > OTHER).sum())
    return f"{deviation(x, full):.3f} / {float(each.median()):.3f} / {1000 * others / len(full):.0f}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("-o", "--output", type=Path, help="the file to write")
    arguments.add_argument("--steps", type=int, nargs="*", help="only these step counts")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    found = targets()
    rows = [f"| solver | churn | guidance | steps | level | calls | {TITLE} |", "|---" * (6 + len(COLUMNS)) + "|"]
    for case in cases():
        if given.steps is None or case.steps in given.steps:
            new = compare(found, case, ["regular", "high"] if case.guidance != 1 else ["high"])
            rows += new
            print("\n".join(new), flush=True)
    if given.output is not None:
        given.output.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
