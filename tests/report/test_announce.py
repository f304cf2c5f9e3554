"""TORCH_TRACE and tlparse show the sites and both graphs beside Inductor's artifacts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import LIB

from mxnorm_pass import Report

SCRIPT = LIB / "trace_script.py"
ARTIFACTS = ("mxnorm_sites", "mxnorm_graph_before", "mxnorm_graph_after")
COLD, WARM = (1, 0), (0, 0)


@dataclass(frozen=True)
class Artifact:
    """An entry of the log: frame and compile of the frame, name, encoding, text."""

    compile_id: tuple[int, int]
    name: str
    encoding: str
    payload: str


@dataclass(frozen=True)
class Trace:
    log: Path
    report: Report
    artifacts: tuple[Artifact, ...]

    def of(self, compile_id: tuple[int, int]) -> dict[str, Artifact]:
        return {a.name: a for a in self.artifacts if a.compile_id == compile_id}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder, cache = tmp_path_factory.mktemp("trace"), tmp_path_factory.mktemp("cache")
    environment = {"TORCH_TRACE": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = folder.glob("*.log")
    return Trace(log, Report.from_json(done.stdout), tuple(artifacts_of(log.read_text())))


def artifacts_of(log: str) -> Iterator[Artifact]:
    """Entries are a line of metadata and, indented by a tab, the lines of their payload."""
    for entry in re.split(r"^V\d{4} [^\]]*\] (?=\{)", log, flags=re.MULTILINE)[1:]:
        head, *lines = entry.splitlines()
        metadata = json.loads(head)
        artifact = metadata.get("artifact")
        if artifact is not None and "frame_id" in metadata:
            compile_id = (metadata["frame_id"], metadata["frame_compile_id"])
            payload = "\n".join(line.removeprefix("\t") for line in lines)
            yield Artifact(compile_id, artifact["name"], artifact["encoding"], payload)


@pytest.mark.full
@pytest.mark.parametrize(
    "compile_id, inductor", [(COLD, "fx_graph_cache_miss"), (WARM, "fx_graph_cache_hit")]
)
def test_artifacts_stand_beside_inductors(
    trace: Trace, compile_id: tuple[int, int], inductor: str
) -> None:
    found = trace.of(compile_id)
    assert inductor in found
    sites, before, after = (found[name] for name in ARTIFACTS)
    assert [a.encoding for a in (sites, before, after)] == ["json", "string", "string"]

    (graph,) = {g.before: g for g in trace.report.graphs}.values()
    assert before.payload == graph.before
    assert after.payload == graph.after
    assert "mxnorm_pass" not in before.payload and "mxnorm_pass.norm_cast" in after.payload
    rows = json.loads(sites.payload)
    assert [(r["norm"], r["status"], r["reason"]) for r in rows] == [
        ("norm", "fused", None),
        ("last", "skipped", "NO_MX_CAST"),
    ]
    assert "trace_script.py" in rows[1]["near_miss"]["source"]


@pytest.mark.full
def test_one_set_of_artifacts_per_compile(trace: Trace) -> None:
    names = [(a.compile_id, a.name) for a in trace.artifacts if a.name.startswith("mxnorm")]
    assert names == [(i, name) for i in (COLD, WARM) for name in ARTIFACTS]


@pytest.mark.full
def test_tlparse_lists_the_artifacts(trace: Trace, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("tlparse")
    arguments = ["--strict", "--no-browser", "-o", tmp_path / "out"]
    subprocess.run([program, trace.log, *arguments], check=True, capture_output=True, timeout=60)
    index = (tmp_path / "out" / "index.html").read_text()
    for name in ARTIFACTS:
        links = set(re.findall(rf'href="([^"]*/{name}_\d+\.\w+)"', index))
        assert len(links) == 2
        assert all((tmp_path / "out" / link).stat().st_size for link in links)
