"""Recipes of training on one GPU: their kernels, and a step of two Llama-3-8B-shaped layers.

    python examples/bench_recipes.py
    python examples/bench_recipes.py --part kernels --recipes mxfp8 nvfp4
    python examples/bench_recipes.py --part steps --recipes none mxfp8 --json steps.json
    python examples/bench_recipes.py --tables-of examples/results/bench_recipes.json steps.json

Kernels: of a bf16 gradient of 8192 rows the casts along both dimensions, packed or dequantised to
bf16, by one kernel, by one for each dimension, and by Inductor where nothing is random; the same of
a norm. They are measured as in ``bench_kernels.py``, beside a copy of as many bytes: a CUDA graph
of many calls, the L2 cache flushed before each replay, contestants in turns.

Steps: forward and backward in bf16 weights, no optimizer, no head, 4 x 2048 tokens;
``torch.compile`` in bf16 against backend="mxnorm", quantize="all", in turns. "none" is without a
recipe: the forward's casts alone; "matmuls" are the step's, without all else. Recipes whose forward
is of high precision have it in MXFP8. Casts are emulated: matmuls are bf16's in every step.

The JSON is written anew after each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bench_recipe_kernels as kernels
import bench_recipe_steps as steps
import torch
from bench_kernels import BadInput, in_processes, positive_int
from benchlib import RESULTS, invocation, machine, save_json

PARTS = ("kernels", "steps")
# In a process that compiles a step, of which there are fewer than kernels, but longer ones.
STEP_THREADS = 3
# Each holds memory of the GPU.
MOST_PROCESSES = 15


@dataclass(frozen=True)
class Planned:
    """One measurement, for one of ``PARTS``."""

    part: str
    name: str
    measure: Callable[[], Any]


@dataclass
class Results:
    """What was measured so far, and what failed, and why."""

    kernels: list[kernels.Measured] = field(default_factory=list)
    steps: list[steps.Measured] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, planned: Planned) -> str:
        """Measure it; what to print of it."""
        try:
            measured = planned.measure()
        except Exception as error:  # one's failure is a result, not the end
            reason = f"{type(error).__name__}: {str(error).strip()[:500]}"
            self.failures.append(f"{planned.part} {planned.name} failed: {reason}")
            return self.failures[-1]
        getattr(self, planned.part).append(measured)
        return str(measured)

    def load(self, path: Path) -> None:
        """Add what a JSON has."""
        try:
            content = json.loads(path.read_text())
            self.kernels += map(kernels.Measured.from_json, content["kernels"])
            self.steps += map(steps.Measured.from_json, content["steps"])
            self.failures += content["failures"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"cannot read {path}: {error}") from None

    def tables(self) -> str:
        parts = (kernels.table(self.kernels), steps.table(self.steps), self.failures)
        return "\n\n".join("\n".join(lines) for lines in parts if lines)


def parse_args(argv: list[str]) -> argparse.Namespace:
    known = list(dict.fromkeys((*kernels.RECIPES, *steps.RECIPES)))
    parser = argparse.ArgumentParser(description="Recipes' kernels and training steps on one GPU.")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=known,
        help=f"default: of kernels {', '.join(kernels.RECIPES)}; of steps, beside bf16, "
        f"{', '.join(steps.RECIPES)}",
    )
    parser.add_argument("--rounds", type=positive_int, default=12, help="timed runs of each")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="stop before the next measurement"
    )
    parser.add_argument(
        "--precompile",
        type=positive_int,
        metavar="N",
        default=max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1)),
        help="first fill the caches from N processes; default here: %(default)s",
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_recipes.json")
    parser.add_argument(
        "--tables-of", type=Path, nargs="+", metavar="JSON", help="no measuring: show these"
    )
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    return args


def planned_cases(args: argparse.Namespace) -> list[kernels.Case]:
    if "kernels" not in args.part:
        return []
    return kernels.cases([r for r in kernels.RECIPES if r in (args.recipes or kernels.RECIPES)])


def planned_steps(args: argparse.Namespace) -> list[str]:
    return [steps.BASELINE, *(args.recipes or steps.RECIPES)] if "steps" in args.part else []


def plan(args: argparse.Namespace) -> Iterator[Planned]:
    for case in planned_cases(args):
        yield Planned("kernels", str(case), partial(kernels.measure, case, args.rounds))
    layers = steps.Steps()
    for recipe in planned_steps(args):
        yield Planned("steps", recipe, partial(layers.measure, recipe, args.rounds))


@dataclass(frozen=True)
class Job:
    """What to compile, and in how many threads."""

    run: Callable[[], None]
    threads: int


def compile_job(job: Job) -> None:
    """For the sake of the caches on disk."""
    torch._dynamo.reset()
    # Tuning beside other processes would choose badly: only the measuring process remembers.
    with torch._inductor.config.patch(compile_threads=job.threads, autotune_local_cache=False):
        # What fails here fails again, or has more memory, where it is measured.
        with suppress(Exception):
            job.run()
    torch.cuda.empty_cache()


def precompile(args: argparse.Namespace) -> None:
    layers = steps.Steps()
    # The longest first.
    jobs = [Job(partial(layers.compile_once, r), STEP_THREADS) for r in planned_steps(args)]
    jobs += [Job(run, 1) for run in kernels.compile_jobs(planned_cases(args))]
    in_processes(compile_job, jobs, min(args.precompile, len(jobs)))


def measure_all(args: argparse.Namespace) -> Results:
    begun, longest = time.monotonic(), 0.0
    facts, results = {"machine": machine(), **invocation()}, Results()
    precompile(args)
    print(f"precompiled in {time.monotonic() - begun:.0f} s", flush=True)
    planned = list(plan(args))
    for i, one in enumerate(planned):
        elapsed = time.monotonic() - begun
        if args.time_limit is not None and elapsed + longest > args.time_limit:
            print(f"stopped at --time-limit with {len(planned) - i} measurements to go")
            break
        shown = results.add(one)
        save_json(args.json, {**facts, **asdict(results)})
        torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - begun - elapsed)
        print(f"{shown}; {time.monotonic() - begun:.0f} s", flush=True)
    return results


def run(args: argparse.Namespace) -> None:
    if args.tables_of:
        results = Results()
        for path in args.tables_of:
            results.load(path)
    elif torch.cuda.is_available():
        results = measure_all(args)
    else:
        raise BadInput("no CUDA GPU here; --tables-of JSON shows earlier results without one")
    print(results.tables())


def main(argv: Sequence[str]) -> int:
    args = parse_args(list(argv))
    try:
        run(args)
    except BadInput as error:
        print(f"bench_recipes.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
