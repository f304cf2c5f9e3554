"""``explain`` of models without weights says what it says of the same models with weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import mxnorm_pass
from mxnorm_pass import Report

DIM, TOKENS = 64, 16


class Net(nn.Module):
    """Tied weights, a buffer, a tensor that is neither, attention, and a loss."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIM, DIM)
        self.norm, self.linear = nn.RMSNorm(DIM), nn.Linear(DIM, DIM, bias=False)
        self.head = nn.Linear(DIM, DIM, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(DIM))
        self.scale = torch.ones(DIM)
        self.breaks = breaks

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale + self.shift
        q = self.linear(self.norm(x))[None, None]
        y = F.scaled_dot_product_attention(q, q, q)[0, 0]
        if self.breaks:
            torch._dynamo.graph_break()
            y = self.linear(self.norm(y * self.scale))
        return F.cross_entropy(self.head(y), ids)


def explained(device: str, *, fake: bool, inside: bool, breaks: bool = False) -> Report:
    torch._dynamo.reset()
    mode = FakeTensorMode() if fake else nullcontext()
    with mode, torch.device(device):
        model, ids = Net(breaks), torch.zeros(TOKENS, dtype=torch.long)
    with mode if inside else nullcontext():
        return mxnorm_pass.explain(model, ids)


@pytest.mark.full
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "device, fake, inside",
    [("meta", False, False), ("cpu", True, False), ("cpu", True, True), ("meta", True, True)],
)
def test_report_is_that_of_real_tensors(device, fake, inside, train, breaks) -> None:
    with torch.set_grad_enabled(train):
        want = explained("cpu", fake=False, inside=False, breaks=breaks)
        got = explained(device, fake=fake, inside=inside, breaks=breaks)
    assert len(want.graphs) == 1 + breaks and len(want.fused) == 1 + breaks
    assert ("training" if train else "inference") in want.graphs[0].name
    assert got == want


def tensors_of(model: nn.Module) -> list[Any]:
    return [*model.parameters(), *model.buffers(), model.scale]


@pytest.mark.full
def test_meta_model_is_left_as_it_was() -> None:
    with torch.device("meta"):
        model, ids = Net(breaks=False), torch.zeros(TOKENS, dtype=torch.long)
    before = tensors_of(model)
    for callee in (model, model.forward):
        torch._dynamo.reset()
        assert len(mxnorm_pass.explain(callee, ids).fused) == 1
        after = tensors_of(model)
        assert all(a is b for a, b in zip(after, before, strict=True))
        assert model.head.weight is model.embed.weight
        assert not any(isinstance(t, FakeTensor) for t in after)


def test_meta_model_is_left_as_it_was_after_an_error() -> None:
    with torch.device("meta"):
        model, ids = Net(breaks=False), torch.zeros(TOKENS, dtype=torch.float32)
    before = tensors_of(model)
    with pytest.raises(Exception, match="Long|Int|embedding|cross_entropy"):
        mxnorm_pass.explain(model, ids)
    assert all(a is b for a, b in zip(tensors_of(model), before, strict=True))


def test_default_device_meta() -> None:
    """Factory calls inside the model follow it."""

    class WithArange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(DIM), nn.Linear(DIM, DIM, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(self.norm(x + torch.arange(DIM)))
            return y

    with torch.device("meta"):
        report = mxnorm_pass.explain(WithArange(), torch.zeros(TOKENS, DIM))
    assert [site.norm for site in report.fused] == ["norm"]


class _WritesAfterABreak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.norm(x))
        torch._dynamo.graph_break()
        y.add_(1)
        return y


def test_explain_of_writes_into_what_was_computed_before_a_graph_break() -> None:
    report = mxnorm_pass.explain(_WritesAfterABreak(), torch.randn(32, 64))
    assert len(report.fused) == 1
