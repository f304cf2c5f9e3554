"""One training step, with and without the backward's casts along T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from matching import BF16, inputs
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report
from mxnorm_pass.passes.match import decide

WIDTH, FEATURES = 128, 64
both_estimators = pytest.mark.parametrize("estimator", ["mxnorm", "exact"])


@dataclass
class Step:
    """One forward and backward."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    report: Report
    saved: list[Tensor]

    @property
    def fused_ops(self) -> dict[str, int]:
        counts = self.report.graphs[0].ops_after
        prefix = "mxnorm_pass.norm_"
        return {n.split(".")[1]: c for n, c in counts.items() if n.startswith(prefix)}


BOTH, IN_ROWS = {"norm_cast_both": 1}, {"norm_cast": 1}


def rows(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return inputs(*(shape or (4, 16)), WIDTH, dtype=dtype).requires_grad_()


def step(
    model: nn.Module, x: Tensor, backend: str = "mxnorm", dynamic: bool = False, **options: Any
) -> Step:
    torch._dynamo.reset()
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    if backend == "mxnorm":
        options = {"options": {"inner": "aot_eager", **options}}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with mxnorm_pass.record() as report:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = torch.compile(model, backend=backend, **options)(x)
        generator = torch.Generator().manual_seed(2)
        cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
        torch.autograd.backward(outputs, cotangents)
    named = {n: p.grad for n, p in model.named_parameters()}
    return Step(tuple(y.detach() for y in outputs), {"x": x.grad, **named}, report, saved)


def step_without(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor, **options: Any
) -> Step:
    """The step in which no transposed cast is found."""
    with monkeypatch.context() as patch:
        patch.setattr(decide, "transposed_casts", lambda norm, reads: [])
        found = step(model, x, **options)
    assert "norm_cast_both" not in found.fused_ops
    return found


def assert_same_step(got: Step, want: Step) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got.outputs, want.outputs, strict=True))
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert gradient.isfinite().all() and gradient.any()
        assert torch.equal(got.gradients[name], gradient), name
