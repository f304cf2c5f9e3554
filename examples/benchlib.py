"""Shared by the examples: interleaved timing, and JSON that says on what it was measured."""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mxnorm_pass.files import write_text

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median and the 10% and 90% quantiles over the rounds."""

    us: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1])


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: str,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Microseconds of every run, each of them once a round, in a new order every round.

    Taking turns, all see the same clocks. ``before`` runs ahead of each, outside its time.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(0).shuffle
    pending: list[tuple[str, Any, Any]] = []
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            before()
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                runs[name]()
                end.record()
                pending.append((name, start, end))
            else:
                begun = time.perf_counter()
                runs[name]()
                samples[name].append((time.perf_counter() - begun) * 1e6)
    if pending:
        torch.cuda.synchronize()
    for name, start, end in pending:
        samples[name].append(start.elapsed_time(end) * 1e3)
    return samples


def machine() -> dict[str, Any]:
    """The hardware, and the versions of what decides the speed."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for package in ("triton", "torchao", "transformers", "liger-kernel", "mxnorm_pass"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": gpu.name,
            "l2_bytes": gpu.L2_cache_size,
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return facts


def invocation() -> dict[str, str]:
    """Command line and time of this run."""
    command = ["python", *sys.argv]
    return {"command": " ".join(command), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def save_json(path: Path, content: Any) -> None:
    """Write all of it or, when interrupted, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
