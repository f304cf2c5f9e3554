"""Graphs that versions of torch and torchao have traced are matched on the installed ones.

``golden/graphs`` holds one file per spelling, ``golden/index.json`` says which versions trace it,
and ``golden/record.py`` adds those of the installed versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden.cases import CASES, Fused
from golden.index import GRAPHS, Index, Recording, installed
from golden.record import DECOMPOSITIONS
from golden.text import MissingOp, rebuild
from paths import LIB
from torch import Tensor, fx

from mxnorm_pass import SkipReason
from mxnorm_pass.graph.nodes import is_backward
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.joint import run_pass

INDEX = Index.load()
RECORD = LIB / "golden" / "record.py"


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    """For torchao's ops that this machine does not register."""
    with torch.library._scoped_library("torchao", "FRAGMENT") as library:
        yield library


@pytest.mark.parametrize("file", sorted(INDEX.graphs))
def test_recorded_graph_is_matched(file: str, library: torch.library.Library) -> None:
    case, kind, *_ = file.split(".")
    module = _rebuilt(file, library)
    expected, outputs = _outcome(file, module.graph), _described_outputs(module.graph)
    config = MXNormConfig(**CASES[case].options)
    result = run_pass(module.graph, config, decompositions=DECOMPOSITIONS[kind]())
    (site,) = result.sites
    assert site.norm == "norm"
    if isinstance(expected, Fused):
        assert (site.status, site.reason) == ("fused", None), str(site)
        got = Fused(str(site.format), site.consumers, site.gain)  # type: ignore[arg-type]
        assert got == expected
    else:
        assert (site.status, site.reason) == ("skipped", expected), str(site)
    assert _described_outputs(module.graph) == outputs


def _outcome(file: str, graph: fx.Graph) -> Fused | SkipReason:
    """What must become of the norm: the casts compute what this torch makes of them."""
    elements = filter(None, map(_unclamped_element, graph.nodes))
    if all(map(_saturates, elements)):
        return CASES[file.split(".")[0]].outcome
    return SkipReason.CAST_NOT_RECOGNIZED


_CLAMPS = {getattr(torch.ops.aten, name).default for name in ("clamp", "clamp_max", "minimum")}


def _unclamped_element(node: fx.Node) -> torch.dtype | None:
    """The float8 type of a cast that leaves it to torch what becomes of too large values.

    torchao clamps first, but not where Dynamo is at work, which includes AOTAutograd from
    torch 2.13 on; only RCEIL always does.
    """
    value = node.meta.get("val")
    if node.op != "call_function" or is_backward(node) or not isinstance(value, Tensor):
        return None
    source = node.args[0] if node.args else None
    if value.dtype not in ELEMENT_DTYPES or not isinstance(source, fx.Node):
        return None
    is_cast = isinstance(source.meta["val"], Tensor) and source.meta["val"].dtype == torch.float32
    return value.dtype if is_cast and source.target not in _CLAMPS else None


def _saturates(element: torch.dtype) -> bool:
    return bool(torch.tensor(1e6).to(element).float().isfinite())


def _rebuilt(file: str, library: torch.library.Library | None = None) -> fx.GraphModule:
    try:
        return rebuild((GRAPHS / file).read_text(), library)
    except MissingOp as op:
        assert installed() not in INDEX.graphs[file], f"{installed()} has recorded {op}"
        pytest.skip(f"torch {torch.__version__} has no {op}")


def _described_outputs(graph: fx.Graph) -> list[object]:
    values = [n.meta["val"] for n in graph.output_node().args[0]]  # type: ignore[union-attr]
    return [(v.shape, v.stride(), v.dtype, v.device) for v in values]


@pytest.mark.full
@pytest.mark.parametrize("file", [f for f in sorted(INDEX.graphs) if not f.startswith("sm100")])
def test_exact_estimator_changes_no_bit_of_a_recorded_graph(file: str) -> None:
    case, kind, *_ = file.split(".")
    module = _rebuilt(file)
    inputs = [_random(n.meta["val"]) for n in module.graph.find_nodes(op="placeholder")]
    want = module(*inputs)
    config = MXNormConfig(**{**CASES[case].options, "quantize": "existing", "estimator": "exact"})
    run_pass(module.graph, config, decompositions=DECOMPOSITIONS[kind]())
    module.recompile()
    for a, b in zip(module(*inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _random(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(like.ndim)
    if like.dtype == torch.float8_e8m0fnu:
        exponents = torch.randint(120, 124, like.shape, generator=generator)
        return exponents.to(torch.uint8).view(like.dtype)
    x = torch.randn(like.shape, generator=generator).to(like.dtype)
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(x)


def _traced_now(directory: Path, cases: set[str]) -> list[Recording]:
    """What the installed versions trace; in a process of its own, which imports torchao anew."""
    output = directory / "recordings.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(
        [sys.executable, str(RECORD), "--output", str(output), *sorted(cases)],
        env=environment,
        check=True,
        capture_output=True,
    )
    return [Recording(**entry) for entry in json.loads(output.read_text())]


@pytest.fixture(scope="module")
def traced_now(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Recording]:
    """Of the cases that this run asks for."""
    if installed() not in INDEX.versions():
        pytest.skip(f"{installed()} is not recorded: run python {RECORD.name}")
    asking = [item for item in request.session.items if "traced_now" in item.fixturenames]
    cases = {item.callspec.params["name"].split(".")[0] for item in asking}
    recordings = _traced_now(tmp_path_factory.mktemp("golden"), cases)
    return {r.name: r for r in recordings}


@pytest.mark.full
@pytest.mark.parametrize("name", [f"{case}.{kind}" for case in CASES for kind in DECOMPOSITIONS])
def test_installed_versions_trace_what_is_recorded(
    name: str, traced_now: dict[str, Recording]
) -> None:
    now = traced_now[name]
    file = INDEX.file(name, installed())
    if file is not None and now.missing == "triton is not installed":
        pytest.skip(now.missing)
    if file is None:
        assert now.text is None and now.missing == INDEX.missing[name][installed()]
    else:
        assert now.text == file.read_text(), f"{file.name} has changed: run python {RECORD.name}"
