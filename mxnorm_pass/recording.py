"""Collect what compiles report, while they happen and when a warm cache skips the pass.

On a warm compile cache the pass does not run, so its result is kept on disk beside Inductor's
cache, under a key of all that decides it.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxnorm_pass.graph_pass import PassResult
from mxnorm_pass.report import Report

_lock = threading.Lock()
_open_reports: list[Report] = []


@contextmanager
def record() -> Iterator[Report]:
    """Collect a report of every compile inside, warm caches included.

    Compiles happen at the first call of a compiled model, so the call belongs inside::

        with mxnorm_pass.record() as report:
            compiled(inputs)
        print(report)
    """
    report = Report()
    with _lock:
        _open_reports.append(report)
    try:
        yield report
    finally:
        with _lock:
            _open_reports.remove(report)


def publish(result: PassResult) -> None:
    """Add the result to every report that is being recorded."""
    with _lock:
        for report in _open_reports:
            report.add(result.graph)


def store(key: str, result: PassResult) -> None:
    """Keep the result for compiles that find a warm cache; losing it costs only a retrace."""
    path = _path(key)
    report = Report([result.graph])
    entry = {"matmul_modules": result.matmul_modules, "report": report.to_json()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(entry, file)
        os.replace(file.name, path)
    except OSError:
        return


def load(key: str) -> PassResult | None:
    """The result that an earlier compile stored, None if there is none that can be read."""
    try:
        entry = json.loads(_path(key).read_text())
        graph = Report.from_json(entry["report"]).graphs[0]
        return PassResult(graph, tuple(entry["matmul_modules"]), seconds=0.0)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _path(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "mxnorm_pass" / f"{key}.json"
