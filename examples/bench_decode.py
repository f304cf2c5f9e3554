"""Decoding on one GPU: linears of few rows from MXFP8 weights, and a token of a Llama-3-8B.

    python examples/bench_decode.py
    python examples/bench_decode.py --part kernels --rows 1 16
    python examples/bench_decode.py --part steps --layers 32 --batches 1 --arms mxnorm torchao
    python examples/bench_decode.py --tables-of examples/results/bench_decode.json

Kernels: a linear's kernel against cuBLAS in bf16 and a copy of as many bytes as the kernel moves,
measured as in ``bench_kernels.py``: a CUDA graph of many calls with weights of their own, the L2
cache flushed before each replay, contestants in turns.

Steps: one token behind a context of 1024 in a static cache, random weights, in a CUDA graph:
"bf16" is ``torch.compile``; the others run from MXFP8 weights, "torchao" those of torchao under
``torch.compile``, "mxnorm" and "exact" the same under this backend with ``freezing`` after
``mxnorm_pass.convert``, "mxnorm, plain model" those that ``freezing`` casts, and
"mxnorm, lm_head too" that of the head, too. All take turns.

The JSON is written anew after each measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bench_decode_kernels as kernels
import bench_decode_steps as steps
import torch
from bench_kernels import BadInput, positive_int
from benchlib import RESULTS, invocation, machine, save_json

PARTS = ("kernels", "steps")


@dataclass(frozen=True)
class Planned:
    """Measurements of one of ``PARTS`` that are made together."""

    part: str
    name: str
    measure: Callable[[], list[Any]]


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
        getattr(self, planned.part).extend(measured)
        return "\n".join(map(str, measured))

    def load(self, path: Path) -> None:
        """Add what a JSON has."""
        try:
            content = json.loads(path.read_text())
            self.kernels += map(kernels.Measured.from_json, content["kernels"])
            self.steps += map(steps.Measured.from_json, content["steps"])
            self.failures += content["failures"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{path}: cannot read results of this script: {error!r}") from None

    def tables(self) -> str:
        parts = (kernels.table(self.kernels), steps.table(self.steps), self.failures)
        return "\n\n".join("\n".join(lines) for lines in parts if lines)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoding from MXFP8 weights on one GPU.")
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rows", type=positive_int, nargs="+", default=list(kernels.ROWS), help="of kernels")
    add("--layers", type=positive_int, default=32, help="of the model that makes a token")
    add("--batches", type=positive_int, nargs="+", default=list(steps.BATCHES))
    arms = [arm for arm in steps.ARMS if arm != steps.BASELINE]
    add("--arms", nargs="+", choices=arms, default=arms, help="beside bf16")
    add("--rounds", type=positive_int, default=15, help="timed runs of each")
    add("--time-limit", type=float, metavar="SECONDS", help="stop before the next measurement")
    add("--json", type=Path, default=RESULTS / "bench_decode.json")
    add("--tables-of", type=Path, nargs="+", metavar="JSON", help="no measuring: show these")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    return args


def plan(args: argparse.Namespace) -> Iterator[Planned]:
    if "kernels" in args.part:
        for case in kernels.cases(args.rows):
            yield Planned("kernels", str(case), lambda c=case: [kernels.measure(c, args.rounds)])
    if "steps" in args.part:
        model = steps.Steps(steps.Sizes({"num_hidden_layers": args.layers}))
        for batch in args.batches:
            measure = partial(model.measure, args.arms, batch, args.rounds)
            yield Planned("steps", f"batch {batch}", measure)


def measure_all(args: argparse.Namespace) -> Results:
    begun, longest = time.monotonic(), 0.0
    facts, results = {"machine": machine(), **invocation()}, Results()
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
        print(f"bench_decode.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
