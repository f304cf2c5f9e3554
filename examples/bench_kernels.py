"""RMSNorm + block-scaled cast on one GPU: our kernels against a copy, Inductor and Liger.

    python examples/bench_kernels.py --precompile 12 --time-limit 540
    python examples/bench_kernels.py --time-limit 540 --resume     # until it says that all is done
    python examples/bench_kernels.py --format mxfp4 nvfp4 --json fp4.json
    python examples/bench_kernels.py --quick --json quick.json
    python examples/bench_kernels.py --plot-only examples/results/bench_kernels.json

How it measures. A CUDA graph holds many calls of a contestant, each with its own inputs and
outputs; before each replay the L2 cache is flushed, so no call finds its inputs there. Contestants
take turns, in a new order every round; the table shows the median of a call over the rounds. Before
the timed rounds all outputs are filled with 0xFF bytes; after them none may be left, and the first
rows are compared with ``mxnorm_pass.functional``. "copy" moves between two buffers
that together have as many bytes as the work must read and write (``rho``, written by ours alone,
not counted): by ``Tensor.copy_`` or by an elementwise kernel, whichever is faster.
"exact-repeat" is "exact" once more: how far the two are apart is noise.

Contestants: "inductor" is HuggingFace's LlamaRMSNorm and torchao's cast as people write them,
through ``torch.compile``. The tuned ones have the options of max-autotune-no-cudagraphs, which
include coordinate descent: "tuned-blocks" with the norm written on [T, K, 32] and the reshape last,
"tuned-flat" as people write it, "tuned-multi" like "tuned-blocks" with multi-kernel (persistent or
looped row sums, chosen at run time). All have two kernels, the row sum and the rest, which reads x
again; the last two are not measured unless named. "inductor-tuned", in the tables, is the fastest
tuned one at each shape. "nested" is the best that options make of Inductor: one kernel, by one that
is off by default, see ``bench_nested.py``; of kernels stored for a torch without the option each is
timed in up to ten configurations, and the fastest counts. "liger" is Liger's (add and) norm and
the compiled cast. With NVFP4 all are given the tensor scale that bounds the norm's output.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import bench_contestants
import bench_nested
import bench_report
import torch
from bench_checks import Outputs, compare, poison, unwritten
from bench_contestants import (
    CONTESTANTS,
    COPIES,
    DEFAULT,
    FORMATS,
    TUNED,
    VARIANTS,
    Inputs,
    Variant,
    moved_bytes,
)
from bench_report import Measured
from benchlib import RESULTS, Timing, interleaved, invocation, machine, save_json
from rich.console import Console
from torch import Tensor

TOKENS = (1, 16, 128, 1024, 4096, 8192, 16384, 32768)
WIDTHS = (2048, 4096, 5120, 8192, 16384)
# Casts in both directions are measured at this many tokens.
BOTH_TOKENS = 8192
QUICK = {"tokens": [16, 8192], "widths": [4096], "rounds": 10}
# A replay moves this much, a millisecond on an H100, so that its own launch does not count.
REPLAY_BYTES = 3e9
MAX_CALLS = 256
ROUNDS_TO_CHOOSE = 5
COMPARED_ROWS = 256
# Where the output is no terminal.
TABLE_WIDTH = 215


class BadInput(Exception):
    """A wrong option or file, to be shown without a traceback."""


class Work(Protocol):
    """What contestants do: the bytes that a call moves, and the calls in one graph."""

    @property
    def bytes(self) -> int: ...

    @property
    def calls(self) -> int: ...


@dataclass(frozen=True)
class Case:
    variant: Variant
    tokens: int
    width: int
    format: str = "mxfp8"

    @property
    def bytes(self) -> int:
        return moved_bytes(self.variant, self.tokens, self.width, self.format)

    @property
    def calls(self) -> int:
        return calls_that_move(self.bytes)

    def __str__(self) -> str:
        return f"{self.variant} {self.tokens}x{self.width} {self.format}"


def calls_that_move(bytes: int) -> int:
    """Calls in one graph; at least two, which rotates the inputs of the largest shapes."""
    return min(MAX_CALLS, max(2, math.ceil(REPLAY_BYTES / bytes)))


def grid(
    variants: Sequence[Variant],
    tokens: Sequence[int],
    widths: Sequence[int],
    formats: Sequence[str] = ("mxfp8",),
) -> list[Case]:
    """The cases, those that move most first: what matters most, should the time run out."""
    cases = [Case(*names) for names in product(variants, tokens, widths, formats)]
    cases = [c for c in cases if c.variant != "both" or c.tokens == BOTH_TOKENS]
    return sorted(cases, key=lambda c: -c.bytes)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Bandwidth of RMSNorm + block-scaled cast on one GPU, ours and others'."
    )
    number = positive_int
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["mxfp8"])
    parser.add_argument("--tokens", type=number, nargs="+", default=list(TOKENS), metavar="T")
    parser.add_argument("--widths", type=number, nargs="+", default=list(WIDTHS), metavar="D")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(DEFAULT))
    parser.add_argument("--rounds", type=number, default=25, help="timed replays of each")
    parser.add_argument(
        "--tuned-from", type=number, default=1024, metavar="T", help="tune from T tokens on"
    )
    parser.add_argument("--quick", action="store_true", help=f"instead of the grid: {QUICK}")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop between shapes")
    parser.add_argument(
        "--precompile", type=number, metavar="N", help="first fill the caches from N processes"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what --json has")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_kernels.json")
    parser.add_argument("--plot", type=Path, help="a PNG; default: beside --json")
    parser.add_argument("--plot-only", type=Path, metavar="JSON", help="no measuring: show these")
    args = parser.parse_args(argv)
    if args.quick:
        for name, value in QUICK.items():
            setattr(args, name, value)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if any(width % bench_contestants.BLOCK for width in args.widths):
        parser.error(f"--widths must be multiples of {bench_contestants.BLOCK}")
    return args


def draw_inputs(case: Case, calls: int, device: str = "cuda") -> list[Inputs]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        kwargs: Any = {"device": device, "dtype": torch.bfloat16, "generator": generator}
        return torch.randn(*shape, **kwargs)

    weight = 1 + 0.1 * normal(case.width)
    scale = bench_contestants.tensor_scale(weight, case.format)
    shape = (case.tokens, case.width)
    sets = []
    for _ in range(calls):
        residual = normal(*shape) if case.variant == "residual" else None
        sets.append(Inputs(3 * normal(*shape), residual, weight, scale))
    return sets


def copies(case: Work, name: str) -> list[Callable[[], Outputs]]:
    """Calls that copy: source and target together are ``case.bytes``, new ones for each call."""
    copy = torch.Tensor.copy_ if name == "copy-memcpy" else copy_by_kernel

    def one() -> Callable[[], Outputs]:
        source = torch.empty(case.bytes // 2, dtype=torch.uint8, device="cuda").random_(0, 255)
        target = torch.empty_like(source)
        return lambda: {"copy": copy(target, source)}

    return [one() for _ in range(case.calls)]


def copy_by_kernel(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return torch.bitwise_not(source, out=target)


@dataclass
class Entry:
    """A contestant in a graph, with the outputs of each of its calls.

    ``calls`` own what the graph reads; capturing the next graph empties the allocator's cache.
    """

    graph: torch.cuda.CUDAGraph
    calls: list[Callable[[], Outputs]]
    outputs: list[Outputs]
    compile_seconds: float
    launched: str


def prepare(name: str, case: Case, sets: list[Inputs]) -> Entry:
    """The contestant in a graph: of all its candidates the one with the fastest."""
    if name in COPIES:
        return capture(copies(case, name))
    best: Entry | None = None
    least = math.inf
    failure: Exception = ValueError(f"{name} has nothing for {case}")
    weight = sets[0].weight
    for launched, call in bench_contestants.candidates(
        name, case.variant, case.tokens, weight, case.format
    ):
        try:
            entry = capture([partial(call, inputs) for inputs in sets], launched)
            # Of a single one it decides nothing, but costs milliseconds.
            us = time_entries(case, {name: entry}, ROUNDS_TO_CHOOSE)[name].us
        except Exception as error:  # too many registers, or too much shared memory
            failure = error
            continue
        if us < least:
            best, least = entry, us
    if best is None:
        raise failure
    return best


def capture(calls: list[Callable[[], Outputs]], launched: str = "") -> Entry:
    begun = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in calls[:2]:
            one()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Outputs that stay referenced keep their own memory in the graph's pool.
        outputs = [one() for one in calls]
    return Entry(graph, calls, outputs, seconds, launched)


def wanted(case: Case, args: argparse.Namespace) -> list[str]:
    def belongs(name: str) -> bool:
        if name == "liger" and case.variant == "both":
            return False
        if name == "nested":
            return bench_nested.offers(case.variant, case.format, case.tokens, case.width)
        return name not in TUNED or case.tokens >= args.tuned_from

    return [name for name in args.contestants if belongs(name)]


@torch.no_grad()
def compile_once(job: tuple[Case, str], device: str) -> None:
    """Compile one contestant for one shape, for the sake of the caches on disk."""
    torch._dynamo.reset()
    # Tuning beside other processes would choose badly: only the measuring process remembers.
    with torch._inductor.config.patch(compile_threads=1, autotune_local_cache=False):
        # What fails here fails again, or has more memory, where it is measured.
        with suppress(Exception):
            case, name = job
            (inputs,) = draw_inputs(case, 1, device)
            for _, call in bench_contestants.candidates(
                name, case.variant, case.tokens, inputs.weight, case.format
            ):
                with suppress(Exception):
                    call(inputs)
    if device == "cuda":
        torch.cuda.empty_cache()


def precompile(cases: Sequence[Case], args: argparse.Namespace, device: str = "cuda") -> None:
    """Compile in ``args.precompile`` processes what is to be measured in this one."""
    jobs = [(c, n) for c in cases for n in wanted(c, args) if n not in (*COPIES, "exact-repeat")]
    random.Random(0).shuffle(jobs)  # not all of the large ones, with their memory, at once
    in_processes(partial(compile_once, device=device), jobs, args.precompile)


def in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            list(pool.map(function, jobs))
    except BrokenProcessPool as error:
        print(f"--precompile ended early: {error}", flush=True)


@torch.no_grad()
def measure(case: Case, args: argparse.Namespace) -> Measured:
    torch._dynamo.reset()
    sets = draw_inputs(case, case.calls)
    entries: dict[str, Entry] = {}
    failures: dict[str, str] = {}
    for name in wanted(case, args):
        try:
            entries[name] = prepare(name, case, sets)
        except Exception as error:  # one contestant's failure is a result, not the end
            failures[name] = f"{type(error).__name__}: {str(error).strip()[:500]}"
    for entry in entries.values():
        for outputs in entry.outputs:
            poison(outputs)
    times = time_entries(case, entries, args.rounds)
    checks = {}
    for name, entry in entries.items():
        left = sum(unwritten(outputs) for outputs in entry.outputs)
        if name not in COPIES:
            rows = min(case.tokens, COMPARED_ROWS)
            expected = bench_contestants.reference(name, case.variant, sets[0], rows, case.format)
            checks[name] = compare(entry.outputs[0], expected, left)
    return Measured(
        variant=case.variant,
        tokens=case.tokens,
        width=case.width,
        bytes=case.bytes,
        calls=case.calls,
        times=times,
        checks=checks,
        failures=failures,
        compile_seconds={name: entry.compile_seconds for name, entry in entries.items()},
        format=case.format,
        launched={name: entry.launched for name, entry in entries.items() if entry.launched},
    )


def time_entries(case: Work, entries: dict[str, Entry], rounds: int) -> dict[str, Timing]:
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    # Read, not written: no dirty lines are left to be written back during what is timed.
    flush = torch.zeros(2 * l2 // 4, dtype=torch.int32, device="cuda")
    replays = {name: entry.graph.replay for name, entry in entries.items()}
    before: Callable[[], Any] = lambda: torch.max(flush)  # noqa: E731
    interleaved(replays, rounds=3, device="cuda", before=before)
    samples = interleaved(replays, rounds=rounds, device="cuda", before=before)
    return {name: Timing.of([us / case.calls for us in own]) for name, own in samples.items()}


def load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        content["cases"] = [Measured.from_json(case) for case in content["cases"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    return content


def save(path: Path, results: dict[str, Any]) -> None:
    save_json(path, {**results, "cases": [asdict(case) for case in results["cases"]]})


def start(args: argparse.Namespace) -> dict[str, Any]:
    """New results, or with ``--resume`` those of before, which must be of the same machine."""
    here = machine()
    if not (args.resume and args.json.exists()):
        return {"machine": here, "runs": [invocation()], "cases": []}
    results = load(args.json)
    if results["machine"] != here:
        raise BadInput(f"{args.json} was measured with {results['machine']}, this is {here}")
    results["runs"].append(invocation())
    return results


def remaining(args: argparse.Namespace, measured: list[Measured]) -> Iterator[Case]:
    done = {(m.variant, m.tokens, m.width, m.format) for m in measured}
    for case in grid(args.variants, args.tokens, args.widths, args.format):
        if (case.variant, case.tokens, case.width, case.format) not in done:
            yield case


def measure_all(args: argparse.Namespace, results: dict[str, Any]) -> None:
    begun, longest = time.monotonic(), 0.0
    cases = list(remaining(args, results["cases"]))
    if args.precompile:
        precompile(cases, args)
        print(f"precompiled in {time.monotonic() - begun:.0f} s", flush=True)
    for i, case in enumerate(cases):
        elapsed = time.monotonic() - begun
        if args.time_limit is not None and elapsed + longest > args.time_limit:
            print(f"stopped at --time-limit with {len(cases) - i} shapes to go: use --resume")
            return
        results["cases"].append(measure(case, args))
        save(args.json, results)
        gc.collect()
        torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - begun - elapsed)
        measured: Measured = results["cases"][-1]
        shown = " ".join(f"{name}={t.us:.1f}" for name, t in measured.times.items())
        print(f"{case}: {shown} us; {time.monotonic() - begun:.0f} s", flush=True)
        for name, failure in measured.failures.items():
            print(f"  {name} failed: {failure}", flush=True)
        for name, launched in measured.launched.items():
            print(f"  {name} launched as {launched}", flush=True)
    print("all shapes are done")


def show(results: dict[str, Any], plot: Path, console: Console) -> None:
    gpu = results["machine"].get("gpu")
    console.print(
        ", ".join([str(gpu), *(f"{n} {results['machine'][n]}" for n in ("torch", "triton"))])
    )
    for table in bench_report.tables(results["cases"]):
        console.print(table)
    try:
        bench_report.plot(results["cases"], f"RMSNorm + block-scaled cast, {gpu}", plot)
    except ImportError:
        print("no plot: matplotlib is not installed; --plot-only draws it later from the JSON")


def run(args: argparse.Namespace, console: Console) -> None:
    if args.plot_only:
        results = load(args.plot_only)
        path = args.plot_only
    else:
        if not torch.cuda.is_available():
            raise BadInput("no CUDA GPU here; --plot-only JSON shows earlier results without one")
        results = start(args)
        path = args.json
        measure_all(args, results)
    show(results, args.plot or path.with_suffix(".png"), console)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        run(args, Console(width=None if sys.stdout.isatty() else TABLE_WIDTH))
    except BadInput as error:
        print(f"bench_kernels.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
