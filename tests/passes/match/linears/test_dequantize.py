"""Spelled-out dequantisation behind a fused norm: which spellings become one op."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import BF16, EPS, F32, WIDTH, Norm, huggingface, inputs, run
from pairwise import some
from reference import build_llama, convert_to_mxfp8_training, quantize_with_torchao
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from training import IDS

import mxnorm_pass
from mxnorm_pass import Graph, Report

DEQUANTIZE = "mxnorm_pass.dequantize.default"
Dequantize = Callable[[Tensor, Tensor], Tensor]


class Linear(nn.Module):
    """torchao's cast, a dequantisation and a matmul, with a weight that is not cast."""

    def __init__(self, dequantize: Dequantize) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dequantize = dequantize
        self.weight = nn.Parameter(torch.randn(64, WIDTH).to(BF16))

    def forward(self, x: Tensor) -> Tensor:
        scales, values = to_mx(
            x.reshape(-1, WIDTH), torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL
        )
        return torch.mm(self.dequantize(values, scales).to(BF16), self.weight.t())


class Model(nn.Module):
    def __init__(self, *dequantize: Dequantize) -> None:
        super().__init__()
        self.norm = Norm(huggingface, torch.rand(WIDTH).to(BF16) + 0.5, EPS)
        self.linears = nn.ModuleList(map(Linear, dequantize))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return tuple(linear(y) for linear in self.linears)


def exact(model: nn.Module, **options: Any) -> Graph:
    """The graph of the exact rewrite, whose results are those of the uncompiled model."""
    x = inputs(dtype=BF16)
    options = {"estimator": "exact", "quantize": "existing", **options}
    got, report = run(model, x, **options)
    assert len(report.fused) == 1, str(report)
    with torch.no_grad():
        want = model(x)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
    return report.graphs[0]


def count(graph: Graph) -> int:
    return graph.ops_after.get(DEQUANTIZE, 0)


# What is recognised


def torchao(values: Tensor, scales: Tensor) -> Tensor:
    return to_dtype(values, scales, torch.float8_e4m3fn, 32, BF16)


def torchao_float32(values: Tensor, scales: Tensor) -> Tensor:
    return to_dtype(values, scales, torch.float8_e4m3fn, 32, F32)


def exponent(values: Tensor, scales: Tensor, bias: int = 127, nan: int = 255) -> Tensor:
    """Scale first, blocks in a dimension of their own."""
    byte = scales.view(torch.uint8)
    factor = torch.exp2(byte.to(F32) - bias)
    factor = torch.where(byte == nan, float("nan"), factor).to(BF16)
    return (factor.unsqueeze(-1) * values.to(BF16).unflatten(-1, (-1, 32))).flatten(-2)


def e8m0_to_float(values: Tensor, scales: Tensor) -> Tensor:
    return (values.to(BF16).view(-1, 32) * scales.to(BF16).view(-1, 1)).view(values.shape)


@pytest.mark.parametrize(
    "dequantize", [torchao, torchao_float32, exponent, e8m0_to_float], ids=lambda f: f.__name__
)
def test_spelling(dequantize: Dequantize) -> None:
    graph = exact(Model(dequantize))
    assert count(graph) == 1
    assert "aten.mul.Tensor" not in graph.ops_after


def test_readers_of_one_dtype_share_one_node() -> None:
    graph = exact(Model(torchao, exponent, torchao_float32, e8m0_to_float))
    assert count(graph) == 2


@pytest.mark.parametrize("dims", [(0,), (0, 1)], ids=str)
def test_dynamic_shapes(dims: tuple[int, ...]) -> None:
    model, x = Model(torchao), inputs(4, 6, WIDTH, dtype=BF16)
    torch._dynamo.mark_dynamic(x, dims)
    got, report = run(model, x, dynamic=None, estimator="exact", quantize="existing")
    with torch.no_grad():
        assert torch.equal(got[0], model(x)[0])
    assert "bf16[4, 6, 128]" not in report.graphs[0].before
    assert count(report.graphs[0]) == 1


# What is not


def wrong_bias(values: Tensor, scales: Tensor) -> Tensor:
    return exponent(values, scales, bias=126)


def no_nan(values: Tensor, scales: Tensor) -> Tensor:
    """2**128 for the byte that means NaN."""
    factor = torch.exp2(scales.view(torch.uint8).to(F32) - 127).to(BF16)
    return (values.to(BF16).view(-1, 32) * factor.view(-1, 1)).view(values.shape)


def another_nan(values: Tensor, scales: Tensor) -> Tensor:
    return exponent(values, scales, nan=254)


def smallest_is_zero(values: Tensor, scales: Tensor) -> Tensor:
    """The exponent's bits alone: 2**-127 has none."""
    byte = scales.view(torch.uint8)
    factor = (byte.to(torch.int32) << 23).view(F32)
    factor = torch.where(byte == 255, float("nan"), factor).to(BF16)
    return (values.to(BF16).view(-1, 32) * factor.view(-1, 1)).view(values.shape)


def blocks_swapped(values: Tensor, scales: Tensor) -> Tensor:
    """The rows' scales in the columns' order."""
    factor = scales.to(BF16).t().reshape(-1, 1)
    return (values.to(BF16).view(-1, 32) * factor).view(values.shape)


def strided_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """Each scale for every fourth element, not for 32 neighbours."""
    blocks = values.to(BF16).view(-1, 32, WIDTH // 32)
    return (blocks * scales.to(BF16).view(-1, 1, WIDTH // 32)).view(values.shape)


def half_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """Right, but each scale meets two rows."""
    factor = scales.to(BF16).view(-1, 1, 1)
    return (values.to(BF16).view(-1, 2, 16) * factor).view(values.shape)


@pytest.mark.parametrize(
    "dequantize",
    [
        wrong_bias,
        no_nan,
        another_nan,
        smallest_is_zero,
        blocks_swapped,
        strided_blocks,
        half_blocks,
    ],
    ids=lambda f: f.__name__,
)
def test_near_miss(dequantize: Dequantize) -> None:
    assert count(exact(Model(dequantize))) == 0


def test_a_near_miss_leaves_the_others_alone() -> None:
    assert count(exact(Model(torchao, wrong_bias))) == 1


def test_linear_that_is_off_keeps_its_own() -> None:
    graph = exact(Model(torchao, torchao), modules={"linears.1": False})
    assert count(graph) == 1
    assert "aten.pow.Tensor_Tensor" in graph.ops_after


class FixedNorm(Model):
    """The norm learns nothing; the weight gradient reads what the matmul reads."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = self.norm(x).view(-1, WIDTH)
            scales, values = to_mx(y, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
            y = torchao(values, scales)
        return (torch.mm(y, self.linears[0].weight.t()),)


@pytest.mark.parametrize("train", [False, True])
def test_what_the_backward_reads_stays_in_parts(train: bool) -> None:
    """The partitioner keeps a result of an op whole, but values and scales for what is spelled."""
    x, model = inputs(dtype=BF16), FixedNorm(torchao)
    _, report = run(model, x, train=train, estimator="exact", quantize="existing")
    assert len(report.fused) == 1
    assert count(report.graphs[0]) == (0 if train else 1)


class HalfCheckpointed(nn.Module):
    """One of two linears behind a norm is recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=EPS)
        self.first, self.second = (nn.Linear(64, 32, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        first = checkpoint(lambda y: self.first(y).tanh().sin(), y, use_reentrant=False)
        return first, self.second(y)


def test_a_checkpointed_region_dequantises_for_itself() -> None:
    _, report = run(HalfCheckpointed(), inputs(2, 8, 64).requires_grad_(), train=True)
    assert len(report.fused) == 1
    # One per linear, and one for each weight.
    assert count(report.graphs[0]) == 4


# Llama


@pytest.mark.full
@some(["inference"], training={"inference": False, "training": True})
def test_llama(training: bool) -> None:
    """All that reads a fused norm's values and scales is one op, or linears on them."""
    convert = convert_to_mxfp8_training if training else quantize_with_torchao
    model = convert(build_llama(BF16, layers=1))
    with torch.set_grad_enabled(training):
        report = mxnorm_pass.explain(model, IDS, use_cache=False)
    assert len(report.fused) == 2
    results = results_of_norms(report)
    if training:
        for names in results:
            (reader,) = readers_of_both(report, *names)
            assert "mxnorm_pass.dequantize.default(" in reader
            assert "'mxfp8 " in reader and "block 32', torch.bfloat16)" in reader
    else:
        views = [[result_of(report, name) for name in names] for names in results]
        linears = [readers_of_both(report, *names) for names in views]
        assert [len(readers) for readers in linears] == [3, 2]
        assert all("mxnorm_pass.mx_linear.default(" in text for group in linears for text in group)


def readers_of_both(report: Report, values: str, scales: str) -> list[str]:
    """Those of values, which read scales behind them."""
    readers = readers_of(report, values)
    assert readers == readers_of(report, scales)
    assert all(f"({values}, {scales}, " in reader for reader in readers)
    return readers


def result_of(report: Report, name: str) -> str:
    """The name of the one matrix that what has a name is seen as."""
    (reader,) = readers_of(report, name)
    assert "aten.reshape.default(" in reader
    lines = report.graphs[0].after.splitlines()
    (line,) = [line for line in lines if line.endswith(f" = {reader}")]
    return line.split(":")[0].strip()


def results_of_norms(report: Report) -> list[tuple[str, str]]:
    """Names of values and scales of each norm's op."""
    lines = report.graphs[0].after.splitlines()
    found = []
    for line in lines:
        name = line.split(" = ")[0].strip()
        if "norm_cast.default(" in line:
            first = 1 if "add_norm_cast.default(" in line else 0
            results = [
                next(n for n in lines if n.endswith(f" = getitem({name}, {i})"))
                for i in (first, first + 1)
            ]
            values, scales = (n.split(":")[0].strip() for n in results)
            found.append((values, scales))
    return found


def readers_of(report: Report, name: str) -> list[str]:
    lines = [line for line in report.graphs[0].after.splitlines() if " = " in line]
    calls = [line.split(" = ", 1)[1] for line in lines]
    marks = [f"{a}{name}{b}" for a, b in itertools.product("( [", ",)]")]
    return [call for call in calls if any(mark in call for mark in marks)]
