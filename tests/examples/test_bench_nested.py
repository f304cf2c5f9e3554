"""Inductor's nested reductions in the benchmark: functions, stored kernels, launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import bench_contestants as contestants
import bench_kernels
import bench_nested
import pytest
import torch
from bench_checks import compare
from bench_contestants import FORMATS
from bench_kernels import Case, Entry, draw_inputs
from bench_nested import Function, NestedKernel, Tile
from benchlib import Timing
from paths import EXAMPLES, LIB, ROOT
from ptx import compiled, recorded_launches

from mxnorm_pass import functional

VARIANTS: tuple[Any, ...] = ("norm", "residual")
SHAPES = [(v, f) for v in VARIANTS for f in FORMATS]
shapes = pytest.mark.parametrize("variant, format", SHAPES)
KERNELS = bench_nested.stored_kernels()


@pytest.fixture
def without_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a torch that cannot compile nested reductions itself."""
    monkeypatch.setattr(bench_nested, "has_option", lambda: False)


def kernel_for(variant: str, format: str, tokens: int, width: int) -> NestedKernel:
    kernel = bench_nested.stored_kernel(variant, format, tokens, width)
    assert kernel is not None
    return kernel


def meta_inputs(kernel: NestedKernel, tokens: int) -> SimpleNamespace:
    """What ``launch`` reads, without memory."""
    x = torch.empty(tokens, kernel.width, dtype=torch.bfloat16, device="meta")
    scale = torch.empty((), device="meta")
    return SimpleNamespace(x=x, residual=x, weight=x[0], tensor_scale=scale)


@shapes
@torch.no_grad()
def test_functions_do_what_functional_does(variant: Any, format: str) -> None:
    (inputs,) = draw_inputs(Case(variant, 64, 256, format), 1, "cpu")
    function = Function(variant == "residual", functional.block_format(format))
    outputs = function.as_named(function(function.as_read(inputs)))
    expected = contestants.reference("exact", variant, inputs, 64, format)
    assert outputs.keys() == expected.keys()
    check = compare(outputs, expected, 0)
    # Pairs are summed up in another order.
    assert check.differing <= 2 and check.steps <= 1


def test_pairs_survive() -> None:
    x = torch.randn(3, 8).bfloat16()
    pairs = x.view(torch.int32)
    first, second = bench_nested.halves(pairs)
    assert torch.equal(first, x[:, ::2]) and torch.equal(second, x[:, 1::2])
    assert torch.equal(bench_nested.joined([first, second]), pairs)


def test_the_table_has_its_kernels() -> None:
    for variant, format in SHAPES:
        for width in (2048, 4096, 8192, 16384):
            kernel = kernel_for(variant, format, 8192, width)
            assert kernel.whole_rows
            assert sorted(kernel.arguments) == sorted(
                kernel.function.inputs + kernel.function.outputs
            )
            assert f"    r0_numel = {kernel.row_elements}" in kernel.source
    for tokens in (1, 16, 128, 1024, 8192 + 32):
        assert not kernel_for("norm", "mxfp8", tokens, 4096).whole_rows


@pytest.mark.parametrize("whole_rows", [True, False])
def test_only_kernels_of_whole_rows_lack_a_mask(whole_rows: bool) -> None:
    for kernel in KERNELS:
        if kernel.whole_rows is whole_rows:
            text = "\n".join(kernel.source)
            assert ("xmask = xindex < xnumel" in text) is not whole_rows
            # The number of rows is an argument.
            assert "    xnumel = " not in text and "_ptr0, " in text


def name_of(kernel: NestedKernel) -> str:
    rows = "whole" if kernel.whole_rows else "masked"
    return f"{kernel.variant}-{kernel.format}-{kernel.width}-{rows}"


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.width == 4096], ids=name_of)
def test_kernels_compile_without_a_gpu(kernel: NestedKernel) -> None:
    tokens = 8192 if kernel.whole_rows else 1000
    inputs = meta_inputs(kernel, tokens)
    ptx = compiled(lambda: bench_nested.launch(kernel, kernel.tiles[-1], inputs), 90)
    assert ptx.spilled_bytes == 0
    # Rows are read in words of 16 bytes; what is read in smaller ones is little.
    assert max(ptx.load_bits) == 128


@pytest.mark.full
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.width == 16384], ids=name_of)
def test_kernels_compile_with_every_tile(kernel: NestedKernel) -> None:
    inputs = meta_inputs(kernel, 8192 if kernel.whole_rows else 1000)
    for tile in kernel.tiles:
        compiled(lambda tile=tile: bench_nested.launch(kernel, tile, inputs), 90)  # type: ignore[misc]


def test_a_launch_hands_over_each_tensor() -> None:
    kernel = kernel_for("residual", "mxfp4", 8192, 4096)
    with recorded_launches() as launches:
        outputs = bench_nested.launch(kernel, Tile(2, 1024, 4), meta_inputs(kernel, 8192))
    (launched,) = launches
    *pointers, rows, elements, tile_rows, tile_elements = launched.arguments.values()
    assert (rows, elements, tile_rows, tile_elements) == (8192, 2048, 2, 1024)
    assert launched.options == {"num_warps": 4, "num_stages": 1}
    dtypes = dict(zip(kernel.arguments, (p.dtype for p in pointers), strict=True))
    pairs, byte = torch.int32, torch.uint8
    assert dtypes == {
        "x": pairs, "residual": pairs, "weight": pairs,
        "total": pairs, "values": byte, "scales": byte,
    }  # fmt: skip
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in outputs.items()}
    assert shapes == {
        "total": ((8192, 4096), torch.bfloat16),
        "values": ((8192, 2048), torch.uint8),
        "scales": ((8192, 128), torch.float8_e8m0fnu),
    }


@pytest.mark.usefixtures("without_option")
def test_candidates_are_tiles_that_fit_a_row() -> None:
    def labels(format: str, width: int) -> list[str]:
        weight = torch.ones(width, device="meta")
        return [n for n, _ in contestants.candidates("nested", "norm", 8192, weight, format)]

    assert len(labels("mxfp8", 16384)) == len(bench_nested.TILES)
    assert labels("mxfp8", 2048) == [str(t) for t in bench_nested.TILES if t.elements <= 2048]
    # A row of 2048 is one of 1024 pairs.
    assert labels("nvfp4", 2048) == [str(t) for t in bench_nested.TILES if t.elements <= 1024]
    with pytest.raises(ValueError, match="no stored kernel for norm mxfp8 8192x64"):
        labels("mxfp8", 64)


@pytest.mark.usefixtures("without_option")
def test_nested_runs_where_there_is_a_kernel() -> None:
    args = bench_kernels.parse_args([])
    offered = [
        case
        for case in (
            Case("norm", 8192, 4096),
            Case("norm", 1000, 4096),
            Case("norm", 8192, 64),
            Case("both", 8192, 4096),
            Case("residual", 8192, 4096, "nvfp4"),
            Case("residual", 1000, 4096, "nvfp4"),
        )
        if "nested" in bench_kernels.wanted(case, args)
    ]
    assert [str(case) for case in offered] == [
        "norm 8192x4096 mxfp8", "norm 1000x4096 mxfp8", "residual 8192x4096 nvfp4"
    ]  # fmt: skip


def test_a_torch_with_the_option_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_nested, "has_option", lambda: True)
    weight = torch.ones(64)
    ((label, _),) = contestants.candidates("nested", "norm", 3, weight)
    assert label == "autotuned"
    assert bench_nested.offers("norm", "mxfp8", 3, 64)
    assert not bench_nested.offers("both", "mxfp8", 8192, 4096)


def test_the_fastest_candidate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"slow": 3.0, "fast": 1.0, "broken": 0.0, "medium": 2.0}

    def candidates(*_: Any) -> Iterator[tuple[str, Any]]:
        yield from ((label, lambda inputs: {}) for label in seconds)

    def capture(calls: list[Any], launched: str = "") -> Entry:
        if launched == "broken":
            raise RuntimeError("out of resource: shared memory")
        graph: Any = None
        return Entry(graph, calls, [], 0.0, launched)

    def time_entries(case: Case, entries: dict[str, Entry], rounds: int) -> dict[str, Timing]:
        return {n: Timing(us, us, us) for n, e in entries.items() for us in [seconds[e.launched]]}

    monkeypatch.setattr(contestants, "candidates", candidates)
    monkeypatch.setattr(bench_kernels, "capture", capture)
    monkeypatch.setattr(bench_kernels, "time_entries", time_entries)
    case = Case("norm", 4, 64)
    sets = draw_inputs(case, 2, "cpu")
    entry = bench_kernels.prepare("nested", case, sets)
    assert entry.launched == "fast" and len(entry.calls) == 2
    for label in ("slow", "fast", "medium"):
        del seconds[label]
    with pytest.raises(RuntimeError, match="shared memory"):
        bench_kernels.prepare("nested", case, sets)


INTERPRET = """
import triton.language as tl
from types import SimpleNamespace
import bench_nested, bench_contestants
from bench_checks import compare
from bench_kernels import Case, draw_inputs

# The interpreter knows nothing of CUDA's library.
libdevice = SimpleNamespace(
    rsqrt=lambda x: tl.rsqrt(x),
    isnan=lambda x: x != x,
    isinf=lambda x: tl.abs(x) == float("inf"),
)
for variant, format, tokens in (
    ("norm", "mxfp8", 3), ("residual", "mxfp4", 4), ("norm", "nvfp4", 4)
):
    # One program of 4 rows needs no mask for 4, though stored for more.
    stored_for = tokens if tokens % 4 else bench_nested.WHOLE_ROWS
    kernel = bench_nested.stored_kernel(variant, format, stored_for, 2048)
    bench_nested.load(kernel).fn.__globals__["libdevice"] = libdevice
    (inputs,) = draw_inputs(Case(variant, tokens, 2048, format), 1, "cpu")
    outputs = bench_nested.launch(kernel, bench_nested.Tile(4, 1024, 4), inputs)
    expected = bench_contestants.reference("exact", variant, inputs, tokens, format)
    check = compare(outputs, expected, 0)
    print(variant, format, check.differing / check.compared)
"""


@pytest.mark.full
def test_kernels_compute_what_they_should() -> None:
    paths = os.pathsep.join(map(str, (ROOT, EXAMPLES, LIB)))
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET], env=env, capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    # The interpreter cuts bf16 off and carries no mantissa of float8 over, a wrong tensor in the
    # place of another leaves hardly an element as it should be.
    assert all(float(line.split()[-1]) < 0.3 for line in lines), done.stdout


GENERATE = """
import json, sys
from dataclasses import asdict
from nested_kernels import generate
print(json.dumps([asdict(generate("norm", format, 4096, True)) for format in ("mxfp8", "nvfp4")]))
"""


@pytest.mark.full
@pytest.mark.skipif(not bench_nested.has_option(), reason="this torch has no nested reductions")
def test_inductor_still_writes_one_kernel() -> None:
    # In a process of its own, in which torch has seen a GPU.
    paths = os.pathsep.join(map(str, (ROOT, EXAMPLES)))
    done = subprocess.run(
        [sys.executable, "-c", GENERATE],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for entry in json.loads(done.stdout.splitlines()[-1]):
        stored = kernel_for("norm", entry["format"], 8192, 4096)
        assert sorted(entry["arguments"]) == sorted(stored.arguments)
        if torch.__version__ == bench_nested.stored()["torch"]:
            assert tuple(entry["source"]) == stored.source


def eager(kernel: NestedKernel, tile: Tile) -> Any:
    """In the place of a launch."""
    function = kernel.function
    return lambda inputs: function.as_named(function(function.as_read(inputs)))


def run_again(case: Case, entries: dict[str, Entry], rounds: int) -> dict[str, Timing]:
    """In the place of replays: all write their outputs once more."""
    for entry in entries.values():
        for call, outputs in zip(entry.calls, entry.outputs, strict=True):
            for name, tensor in call().items():
                outputs[name].copy_(tensor)
    return {name: Timing(1, 1, 1) for name in entries}


@pytest.mark.usefixtures("without_option")
def test_every_contestant_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(calls: list[Any], launched: str = "") -> Entry:
        graph: Any = None
        return Entry(graph, calls, [call() for call in calls], 0.0, launched)

    monkeypatch.setattr(bench_nested, "launching", eager)
    monkeypatch.setattr(bench_kernels, "MAX_CALLS", 2)
    monkeypatch.setattr(bench_kernels, "capture", capture)
    monkeypatch.setattr(bench_kernels, "time_entries", run_again)
    monkeypatch.setattr(bench_kernels, "draw_inputs", lambda c, n: draw_inputs(c, n, "cpu"))
    for variant in VARIANTS:
        case = Case(variant, 32, 2048)
        args = bench_kernels.parse_args(["--contestants", "nested", "exact", "mxnorm-fold"])
        found = bench_kernels.measure(case, args)
        assert found.failures == {}
        assert found.checks.keys() == {"nested", "exact", "mxnorm-fold"}
        assert all(c.unwritten == 0 and c.steps <= 1 for c in found.checks.values())
        assert (found.format, found.launched) == ("mxfp8", {"nested": "1x1024 4 warps"})


def test_what_fails_is_left_to_the_measuring_process(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def candidates(*_: Any) -> Iterator[tuple[str, Any]]:
        yield "broken", lambda inputs: 1 / 0
        yield "good", called.append
        raise ImportError("no such package")

    monkeypatch.setattr(contestants, "candidates", candidates)
    bench_kernels.compile_once((Case("norm", 4, 64), "liger"), "cpu")
    assert len(called) == 1
