"""Collect what compiles report, while they happen and when a warm cache skips the pass.

On a warm compile cache the pass does not run, so its result is kept on disk beside Inductor's
cache, under a key of all that decides it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxnorm_pass.files import write_text
from mxnorm_pass.report.json_values import json_value
from mxnorm_pass.report.report import Report
from mxnorm_pass.report.site import Graph, PassResult, WeightCasts


@dataclass(frozen=True, eq=False)
class _Recording:
    report: Report = field(default_factory=Report)
    thread: int = field(default_factory=threading.get_ident)


_lock = threading.Lock()
_open: list[_Recording] = []


@contextmanager
def record() -> Iterator[Report]:
    """Collect a report of every compile inside, warm caches included.

    Compiles happen at the first call of a compiled model, so the call belongs inside::

        with mxnorm_pass.record() as report:
            compiled(inputs)
        print(report)

    A thread that records gets its own compiles and no other's. Compiles of a thread that does
    not record go to every report that is open in other threads.
    """
    recording = _Recording()
    with _lock:
        _open.append(recording)
    try:
        yield recording.report
    finally:
        with _lock:
            _open.remove(recording)


def publish(results: Iterable[PassResult]) -> None:
    """Add the results to the reports that are open in this thread, else to all that are open."""
    with _lock:
        own = [recording for recording in _open if recording.thread == threading.get_ident()]
        for recording in own or _open:
            for result in results:
                recording.report.add(result.graph)


@dataclass(frozen=True)
class StoredCompile:
    """What is kept of a compile.

    Attributes:
        differentiated: autograd differentiated its graph.
        plan: the estimates that were put into its graphs, see ``plan``.
    """

    results: Sequence[PassResult]
    differentiated: bool
    plan: Sequence[Mapping[str, Any]]


def store(key: str, compiled: StoredCompile) -> None:
    """Keep a compile for those that find a warm cache; losing it costs only a trace."""
    path = _path(key)
    entry = {
        "results": [
            {
                "matmul_modules": r.matmul_modules,
                "graph": r.graph,
                "weight_casts": r.weight_casts,
            }
            for r in compiled.results
        ],
        "differentiated": compiled.differentiated,
        "plan": compiled.plan,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(entry, default=json_value))
    except OSError:
        return


def load(key: str) -> StoredCompile | None:
    """What an earlier compile stored; None if there is nothing that can be read."""
    try:
        entry = json.loads(_path(key).read_text())
        results = [_result(e) for e in entry["results"]]
        return StoredCompile(results, entry["differentiated"], entry["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _result(entry: Mapping[str, Any]) -> PassResult:
    graph = Graph.from_dict(entry["graph"])
    casts = WeightCasts(**entry["weight_casts"])
    modules = tuple(entry["matmul_modules"])
    return PassResult(graph, modules, seconds=0.0, weight_casts=casts)


def _path(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "mxnorm_pass" / f"{key}.json"
