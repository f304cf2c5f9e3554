"""Pre-train many arms on one GPU, several at a time: one compiles while another trains.

    python examples/pretrain_arms.py --text build/text --out build/arms --size 30m --set recipes
    python examples/pretrain_arms.py --text build/text --out build/arms \\
        --arms bf16/rmsnorm mxfp4-rht-sr/mxnorm/lr=1e-3/seed=1/forward=mxfp8 --steps 200

An arm is recipe/norm and settings of pretrain.py behind it. Each writes one JSONL file; those that
are finished are skipped, so that the same command goes on after a time limit. Workers share
Inductor's cache, from which a second seed of an arm is compiled. Their speeds are those of a shared
GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from checkpointlib import BadInput
from prepare_text import Text, load_text
from pretrain import Diverged, OutOfTime, train
from pretrain_metrics import is_finished, read_lines
from pretrain_settings import FORWARD_ONLY, NO_CASTS, SIZES, Places, Run, new_run

from mxnorm_pass import functional

# What belongs to no single arm, or stands in front of its settings.
_NOT_OF_AN_ARM = ("size", "norm", "recipe", "device")
_TYPES = {f.name: str(f.type) for f in fields(Run) if f.name not in _NOT_OF_AN_ARM}
_READ = {"int": int, "float": float, "str": str, "str | None": str}
# How long after the limit a worker may still compile before it is ended.
_GRACE = 15.0


@dataclass(frozen=True)
class Arm:
    """A run without the settings that all arms share.

    Attributes:
        settings: fields of :class:`Run`, in the order of their names.
    """

    recipe: str
    norm: str
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """From recipe/norm/key=value/…

        Raises:
            BadInput: another form, an unknown key, or a value of another type.
        """
        recipe, slash, rest = text.partition("/")
        norm, *pairs = rest.split("/")
        if not slash:
            raise BadInput(f"arm {text!r}: give recipe/norm, such as mxfp8/mxnorm/lr=1e-3/seed=1")
        return cls(recipe, norm, tuple(sorted(_setting(pair, text) for pair in pairs)))

    def __str__(self) -> str:
        return "/".join([self.recipe, self.norm, *(f"{k}={v}" for k, v in self.settings)])

    @property
    def file_name(self) -> str:
        return str(self).replace("/", "_") + ".jsonl"

    def run(self, size: str, shared: dict[str, Any]) -> Run:
        return new_run(size, self.norm, self.recipe, **{**shared, **dict(self.settings)})


def _setting(pair: str, arm: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    read = _READ.get(_TYPES.get(key, ""))
    if not equals or read is None:
        allowed = ", ".join(name for name, type in _TYPES.items() if type in _READ)
        raise BadInput(f"arm {arm!r}: {pair!r} is no setting; give key=value of {allowed}")
    try:
        return key, read(value)
    except ValueError:
        raise BadInput(f"arm {arm!r}: {key} takes {read.__name__}, not {value!r}") from None


def recipe_arms() -> list[Arm]:
    """bf16 and each recipe under both norms, seed 0 of all first; the least important come last.

    What the forward leaves in high precision is cast to MXFP8, or MXNorm had nothing to act on.
    """
    names = ["mxfp8", "mxfp4-rht-sr", "nvfp4", "mxfp4", "mxfp4-sr", "mxfp4-rht"]
    arms = []
    for seed in (0, 1):
        arms.append(Arm(NO_CASTS, "rmsnorm", (("seed", seed),)))
        for name, norm in product(names, ("rmsnorm", "mxnorm")):
            in_full = functional.recipe(name).forward.left.format is None
            forward = (("forward", "mxfp8"),) if in_full else ()
            arms.append(Arm(name, norm, (*forward, ("seed", seed))))
    return arms


def norm_arms() -> list[Arm]:
    """The casts of the forward alone: RMSNorm, and MXNorm with each gradient and p of 1 and 2."""
    arms = []
    for seed in (0, 1):
        arms.append(Arm(FORWARD_ONLY, "rmsnorm", (("seed", seed),)))
        for p, gradient in product((2.0, 1.0), ("true", "orthogonal", "paper")):
            settings = (("gradient", gradient), ("p", p), ("seed", seed))
            arms.append(Arm(FORWARD_ONLY, "mxnorm", settings))
    return arms


SETS = {"recipes": recipe_arms, "norms": norm_arms}


@dataclass(frozen=True)
class Task:
    """One arm for a worker."""

    name: str
    run: Run
    places: Places


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        failed: False also for a loss that diverged, which is a result.
    """

    name: str
    text: str
    failed: bool = False


def perform(task: Task, text: Text) -> Outcome:
    """One arm, whatever happens in it."""
    try:
        result = train(task.run, text, task.places, progress=False)
    except (Diverged, OutOfTime) as error:
        return Outcome(task.name, str(error))
    except Exception as error:
        traceback.print_exc()
        return Outcome(task.name, f"failed: {type(error).__name__}: {error}", failed=True)
    said = f"held-out loss {result.held_out:.4f}, {result.tokens_per_s:,.0f} tokens/s"
    return Outcome(task.name, f"{said}, {result.seconds:.0f} s")


def work(tasks: Any, outcomes: Any, text_folder: Path, deadline: float | None) -> None:
    """A worker process: arms until None comes, or no time is left."""
    text = load_text(text_folder)
    while (task := tasks.get()) is not None and not is_over(deadline):
        outcomes.put(perform(task, text))


def is_over(deadline: float | None, grace: float = 0.0) -> bool:
    return deadline is not None and time.time() > deadline + grace


def perform_all(
    tasks: Sequence[Task], text_folder: Path, workers: int, deadline: float | None
) -> list[Outcome]:
    """All arms in their order, until the deadline; prints a line for each that ends.

    Returns:
        Of those that ended, and of workers that died, in the order in which they did.
    """
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    ended: Any = context.Queue()
    count = min(workers, len(tasks))
    for task in (*tasks, *[None] * count):
        waiting.put(task)
    given = (waiting, ended, text_folder, deadline)
    processes = [context.Process(target=work, args=given) for _ in range(count)]
    for process in processes:
        process.start()
    outcomes: list[Outcome] = []
    while any(process.is_alive() for process in processes) or not ended.empty():
        try:
            outcomes.append(ended.get(timeout=1.0))
            print(f"{outcomes[-1].name}: {outcomes[-1].text}", flush=True)
        except queue.Empty:
            # A worker that compiles looks at no clock.
            if is_over(deadline, _GRACE):
                break
    died = [process.exitcode for process in processes if process.exitcode]
    for process in processes:
        process.terminate()
        process.join()
    waiting.cancel_join_thread()
    if died:
        print(f"workers ended with exit codes {died}: their arms are not finished", flush=True)
        outcomes += [Outcome("worker", f"exit code {code}", failed=True) for code in died]
    return outcomes


def table(names: Iterable[str], out: Path) -> str:
    """The state of every arm, from the files."""
    names = list(names)
    width = max(map(len, names))
    lines = [f"{'arm':<{width}}  {'loss':>8}  {'tokens/s':>9}  {'GiB':>6}  {'s':>6}"]
    for name in names:
        lines.append(f"{name:<{width}}  {_row(read_lines(out / Arm.parse(name).file_name))}")
    return "\n".join(lines)


def _row(lines: list[dict[str, Any]]) -> str:
    if not is_finished(lines):
        return "not finished"
    last = lines[-1]
    if last["kind"] == "diverged":
        return f"diverged: {last['error']}"
    memory = last["peak_memory_bytes"] / 2**30
    speed, seconds = last["tokens_per_s"], last["seconds"]
    return f"{last['loss']:>8.4f}  {speed:>9,.0f}  {memory:>6.2f}  {seconds:>6.0f}"


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train many arms, several at a time.")
    add = parser.add_argument
    add("--text", type=Path, required=True, help="folder that prepare_text.py wrote")
    add("--out", type=Path, required=True, help="folder of the JSONL files")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--arms", nargs="+", metavar="RECIPE/NORM[/KEY=VALUE…]")
    chosen.add_argument("--set", choices=SETS)
    add("--size", choices=SIZES, default="30m")
    add("--workers", type=int, default=3)
    add("--time-limit", type=float, help="seconds; arms that are not finished then do not count")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int)
    length.add_argument("--tokens", type=lambda text: int(float(text)))
    for name, kind in (("lr", float), ("batch", int), ("sequence", int), ("held-out-rows", int)):
        add(f"--{name}", type=kind, help="of arms that do not say")
    for name in ("log-every", "evaluate-every", "norms-every"):
        add(f"--{name}", type=int, help="steps")
    add("--inner")
    add("--deterministic", action="store_true", default=None)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give 1 or more")
    return args


def tasks_of(args: argparse.Namespace, deadline: float | None) -> list[Task]:
    """What is to be done, finished or not.

    Raises:
        BadInput: an arm that cannot be; none of the others has started then.
    """
    arms = SETS[args.set]() if args.set else [Arm.parse(text) for text in args.arms]
    # An arm that is given twice is one.
    arms = list(dict.fromkeys(arms))
    own = ("text", "out", "arms", "set", "size", "workers", "time_limit")
    shared = {k: v for k, v in vars(args).items() if k not in own and v is not None}
    return [
        Task(
            str(arm),
            arm.run(args.size, shared),
            Places(args.out / arm.file_name, None, 0, deadline),
        )
        for arm in arms
    ]


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    deadline = None if args.time_limit is None else time.time() + args.time_limit
    try:
        tasks = tasks_of(args, deadline)
        load_text(args.text)
    except BadInput as error:
        print(f"pretrain_arms.py: {error}", file=sys.stderr)
        return 2
    left = [task for task in tasks if not is_finished(read_lines(task.places.metrics))]
    print(f"{len(tasks)} arms, {len(tasks) - len(left)} finished before", flush=True)
    outcomes: list[Outcome] = []
    if left and not is_over(deadline):
        outcomes = perform_all(left, args.text, args.workers, deadline)
    print(table([task.name for task in tasks], args.out))
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
