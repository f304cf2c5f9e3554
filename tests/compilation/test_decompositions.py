"""The pass writes no op that Inductor expects to be decomposed and has no lowering for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matching import SPELLINGS, Model, expected_warnings, inputs
from pairwise import each_value
from reference import build_llama, convert_to_mxfp8_training, token_ids
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings

import mxnorm_pass
from mxnorm_pass import Report

pytestmark = expected_warnings

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "activation": {"gain": "activation"},
    "exact": {"estimator": "exact"},
    "orthogonal": {"gradient": "orthogonal"},
    "paper": {"gradient": "paper", "p": 1},
    "p=3": {"p": 3},
    "a linear that is off": {"modules": {"*first*": False, "*q_proj": False}},
}


def assert_nothing_to_decompose(report: Report) -> None:
    assert report.graphs
    decomposed = {str(op) for op in select_decomp_table() if op not in lowerings}
    for graph in report.graphs:
        left = decomposed.intersection(graph.ops_after)
        assert not left


@each_value(spelling=["huggingface", "nn.RMSNorm", "gemma", "gain on x"], options=OPTIONS)
def test_norms(spelling: str, options: dict[str, Any]) -> None:
    model, x = SPELLINGS[spelling].model(), inputs().requires_grad_()
    assert_nothing_to_decompose(mxnorm_pass.explain(model, x, options=options))
    with torch.no_grad():
        assert_nothing_to_decompose(mxnorm_pass.explain(model, x, options=options))


@pytest.mark.full
@pytest.mark.parametrize("name", ["plain", "torchao training"])
def test_llama(name: str) -> None:
    model = build_llama(layers=1)
    if name != "plain":
        model = convert_to_mxfp8_training(model)
    ids = token_ids()
    report = mxnorm_pass.explain(model, ids, labels=ids, use_cache=False)
    assert len(report.fused) == 2
    assert_nothing_to_decompose(report)


class Reader(Model):
    """A reader of the norm beside the linears that carries no gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.probe = kind, nn.Linear(128, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return self.first(y), self.second(y), self.read(y)

    def read(self, y: Tensor) -> Tensor:
        if self.kind == "detached":
            return y.detach()
        if self.kind == "share":
            return (y > 1).float().mean()
        if self.kind == "probe":
            return self.probe(y.detach())
        with torch.no_grad():
            return y.abs().amax()


@pytest.mark.parametrize("kind", ["detached", "share", "probe", "no_grad"])
def test_readers_without_a_gradient(kind: str) -> None:
    model, x = Reader(kind), inputs().requires_grad_()
    assert_nothing_to_decompose(mxnorm_pass.explain(model, x))
