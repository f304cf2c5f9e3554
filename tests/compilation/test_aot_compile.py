"""Compiled ahead of time, saved and loaded, whatever the inner compiler."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import LIB
from torch import Tensor
from torch._dynamo.backends import debugging
from usage import Block, inputs

import mxnorm_pass
from mxnorm_pass import Calibration
from mxnorm_pass.compilation import run_graph

saves_graphs = pytest.mark.skipif(
    not hasattr(debugging, "AOTEagerOutputCode"), reason="torch saves what Inductor compiles"
)


def compiled_ahead(block: Block, x: Tensor, **options: Any) -> Any:
    torch._dynamo.reset()
    compiled = torch.compile(block.forward, backend="mxnorm", options=options, fullgraph=True)
    return compiled.aot_compile(((x,), {}))


def load(path: Path) -> Any:
    with open(path, "rb") as file:
        return torch.compiler.load_compiled_function(file)


@saves_graphs
@pytest.mark.parametrize(
    "inner, train",
    [
        pytest.param("aot_eager", False, marks=pytest.mark.full),
        ("aot_eager", True),
        pytest.param("eager", False, marks=pytest.mark.full),
        pytest.param("eager", True, marks=pytest.mark.full),
        pytest.param("inductor", False, marks=pytest.mark.full),
    ],
)
def test_save_and_load(inner: str, train: bool, tmp_path: Path) -> None:
    block, x = Block(), inputs(8, 64).requires_grad_(train)
    path = tmp_path / "block.bin"
    with torch.set_grad_enabled(train), mxnorm_pass.record() as report:
        ahead = compiled_ahead(block, x, inner=inner)
        ahead.save_compiled_function(str(path))
        loaded = load(path)
        got, want = loaded(block, x), ahead(block, x)
    assert len(report.fused) == 1
    assert torch.equal(got, want)
    if train:
        leaves = (x, *block.parameters())
        pairs = (torch.autograd.grad(y.sum(), leaves) for y in (got, want))
        assert all(map(torch.equal, *pairs))


@saves_graphs
def test_calibrated(tmp_path: Path) -> None:
    """Block weights are constants of the graph."""
    weights = torch.tensor([0.05, 0.15])
    calibration = Calibration(weights={"norm": weights})
    block, x = Block(), inputs(8, 64)
    path = tmp_path / "block.bin"
    with torch.no_grad():
        ahead = compiled_ahead(block, x, inner="aot_eager", calibration=calibration)
        ahead.save_compiled_function(str(path))
        assert torch.equal(load(path)(block, x), ahead(block, x))


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from usage import Block
x, want, threads = torch.load(sys.argv[3])
torch.set_num_threads(threads)  # a guard of the graph
assert "mxnorm_pass.ops" not in sys.modules
with torch.no_grad(), open(sys.argv[2], "rb") as file:
    print(torch.equal(torch.compiler.load_compiled_function(file)(Block(), x), want))
"""


@pytest.mark.full
@saves_graphs
def test_load_in_another_process(tmp_path: Path) -> None:
    """The ops come with the graph."""
    block, x = Block(), inputs(8, 64)
    with torch.no_grad():
        ahead = compiled_ahead(block, x, inner="aot_eager")
        ahead.save_compiled_function(str(tmp_path / "block.bin"))
        saved = (x, ahead(block, x), torch.get_num_threads())
        torch.save(saved, tmp_path / "x.pt")
    paths = [str(LIB), str(tmp_path / "block.bin"), str(tmp_path / "x.pt")]
    command = [sys.executable, "-c", LOAD, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr[-2000:]


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_a_torch_that_cannot_save_graphs(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_graph, "_OutputCode", None)
    version = re.escape(torch.__version__)
    with pytest.raises(ValueError, match=f"torch {version} .*inner='inductor'"):
        compiled_ahead(Block(), inputs(8, 64), inner=inner)


def test_frozen_weights_are_refused() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="freezing=True.*aot_compile"):
        compiled_ahead(Block(), inputs(8, 64), freezing=True)
