"""Graph breaks, mutated inputs, foreign tensors and frozen products under ``backend="mxnorm"``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import each_value
from reference import Recipe, build_llama, quantize_with_torchao, reference_of
from torch import Tensor, nn
from usage import (
    AOT,
    IDS,
    Block,
    Tagged,
    assert_as_good_as_eager,
    assert_every_graph_fuses,
    block_reference,
    eager_and_truth,
    generate,
    inputs,
)

import mxnorm_pass
from mxnorm_pass import SkipReason, functional

# Graph breaks


class BreakBeforeLinear(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        torch._dynamo.graph_break()
        return self.linear(y)


class BreakInsideNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        torch._dynamo.graph_break()
        return self.linear(x * rho * self.norm.weight)


class BreakBetweenSites(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + F.pad(super().forward(x), (0, 32))
        print("a graph break that users write")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
@pytest.mark.parametrize(
    ("kind", "inner", "statuses"),
    [
        (BreakBeforeLinear, "aot_eager", [["NO_MX_CAST"], []]),
        (BreakInsideNorm, "aot_eager", [[], []]),
        (BreakBetweenSites, "aot_eager", [["fused"], ["fused"]]),
        pytest.param(BreakBetweenSites, "inductor", [["fused"], ["fused"]], marks=pytest.mark.full),
    ],
)
def test_each_graph_says_what_it_saw(kind: type[Block], inner: str, statuses: Any) -> None:
    block, x = kind(), inputs(4, 64)
    with mxnorm_pass.record() as report, torch.no_grad():
        got = torch.compile(block, backend="mxnorm", options={"inner": inner})(x)
    seen = [[s.reason.name if s.reason else s.status for s in g.sites] for g in report.graphs]
    assert seen == statuses
    for graph in report.graphs:
        assert (graph.before == graph.after) == ("fused" not in {s.status for s in graph.sites})
    with torch.no_grad():
        want = two_sites(block, x) if kind is BreakBetweenSites else block(x)
        truth = two_sites(copy.deepcopy(block).double(), x.double())
    if inner == "aot_eager":
        assert torch.equal(got, want)
    else:
        assert_as_good_as_eager(got, want, truth)


def two_sites(block: Block, x: Tensor) -> Tensor:
    return block_reference(block, x + F.pad(block_reference(block, x), (0, 32)))


# Mutations


class Mutating(Block):
    """Writes into its input before the norm, and the norm's output into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(4, 64))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.norm(x)
        self.last.copy_(y.detach())
        return self.linear(y)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_mutated_inputs_and_buffers(train: bool) -> None:
    block = Mutating()
    with mxnorm_pass.record() as report, torch.set_grad_enabled(train):
        compiled = torch.compile(block, backend="mxnorm", options=AOT)
        for seed in range(2):
            x = inputs(4, 64, seed=seed)
            twice = 2 * x
            got = compiled(x)
            assert torch.equal(x, twice)
            if train:
                # Autograd has the product under no name that the norm reads.
                want = functional.mx_linear(block.norm(twice), block.linear.weight)
                torch.testing.assert_close(got, want + block.linear.bias)
            else:
                assert torch.equal(got, block_reference(block, twice))
            # Not fused, so it holds the exact norm.
            torch.testing.assert_close(block.last, block.norm(twice), rtol=1e-6, atol=1e-6)
    assert len(report.graphs) == 1
    (site,) = report.sites
    assert site.status == ("skipped" if train else "fused")
    assert site.reason is (SkipReason.BACKWARD if train else None)


@pytest.mark.full
def test_freezing_keeps_guards_on_shared_storage() -> None:
    """Two inputs of one storage are compiled for, and not taken for two that share none."""

    class TwoInputs(Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(y)

    block, base = TwoInputs(), inputs(8, 64)
    with torch.no_grad(), mxnorm_pass.record() as report:
        compiled = torch.compile(block, backend="mxnorm", options={"freezing": True})
        for first, second in (((0, 4), (4, 8)), ((0, 4), (0, 4)), ((2, 6), (4, 8))):
            rows, want = base.clone(), base.clone()
            got = compiled(rows[slice(*first)], rows[slice(*second)])
            want[slice(*first)] *= 2
            assert torch.equal(rows, want)
            assert_as_good_as_eager(got, *eager_and_truth(Block(), want[slice(*second)]))
    assert len(report.fused) == len(report.graphs)


@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
@each_value(where=["parameter", "input"], inner=["aot_eager", "inductor"])
def test_a_foreign_tensor_subclass_is_left_alone(where: str, inner: str) -> None:
    block, x = Block().requires_grad_(False), inputs(4, 64)
    want, truth = block(x), copy.deepcopy(block).double()(x.double())
    if where == "parameter":
        block.linear.weight = nn.Parameter(Tagged(block.linear.weight.detach()), False)
    else:
        x = Tagged(x)
    with mxnorm_pass.record() as report, torch.no_grad():
        got = torch.compile(block, backend="mxnorm", options={"inner": inner})(x)
    (site,) = report.sites
    assert (site.norm, site.reason, site.detail) == ("norm", SkipReason.DTENSOR, "Tagged")
    assert report.graphs[0].before == report.graphs[0].after
    assert type(got) is Tagged
    if inner == "aot_eager":
        assert torch.equal(got.inner, want)
    else:
        assert_as_good_as_eager(got.inner, want, truth)


# torchao models


@pytest.mark.full
def test_generate_with_torchao_weights() -> None:
    model = build_llama(torch.bfloat16, layers=1)
    recipe = Recipe(gain="activation", every_linear=True)
    want = generate(reference_of(model, recipe), input_ids=IDS, cache_implementation="static")
    quantize_with_torchao(model)
    model.compile(backend="mxnorm", options=AOT)
    with mxnorm_pass.record() as report:
        got = generate(model, input_ids=IDS, cache_implementation="static")
    assert torch.equal(got, want)
    assert_every_graph_fuses(report, fused=2)


class Product(Block):
    """``x @ W.t()`` where the weight is no input of the graph, but an attribute of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.linear.weight.t()


@pytest.mark.full
def test_product_with_a_frozen_weight() -> None:
    block, x = Product(), inputs(2, 8, 64)
    with torch.no_grad(), mxnorm_pass.record() as report:
        got = torch.compile(block, backend="mxnorm", options={"freezing": True})(x)
    assert len(report.fused) == 1
    block.linear.bias = None
    assert_as_good_as_eager(got, *eager_and_truth(block, x))
