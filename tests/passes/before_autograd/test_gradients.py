"""Gradients of fused norms, whatever surrounds them: those of ``functional`` under autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_programs import (
    EPS,
    FUSED,
    D,
    Detached,
    Estimated,
    HookOnTheOutput,
    Program,
    Thresholds,
    assert_same_step,
    clip_gradient_by_hook,
    expected,
    inputs,
    train,
)
from matching import F32, expected_warnings, only_site
from pairwise import some
from random_training_specs import FakeQuantize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mxnorm_pass
from mxnorm_pass import SkipReason, functional

pytestmark = expected_warnings


@pytest.mark.parametrize("program", FUSED)
def test_gradients_are_those_of_functional(program: type[Program]) -> None:
    model = program()
    x = inputs(1, 32)
    found, report = train(model, x)
    assert report.sites and {site.status for site in report.sites} == {"fused"}, str(report)
    assert_same_step(found, expected(model, x), model.lin.weight.dtype)


@pytest.mark.full
@some(["HookOnTheOutput"], program=[HookOnTheOutput, Detached, Thresholds])
def test_gradients_through_inductor(program: type[Program]) -> None:
    model, x = program(), inputs(32)
    found, report = train(model, x, inner="inductor")
    assert {site.status for site in report.sites} == {"fused"}, str(report)
    assert_same_step(found, expected(model, x), F32)


# Casts whose results the backward multiplies, too


class FakeQuantized(Program):
    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        weight = FakeQuantize.apply(self.lin.weight, None)
        if not isinstance(y, Estimated):
            return F.linear(FakeQuantize.apply(y, None), weight), y.sigmoid()
        cast = functional.mxnorm_cast(x, y.gain, eps=EPS)[:2]
        activation = FakeQuantize.apply(y.estimate, functional.mx_dequantize(*cast))
        return F.linear(activation, weight), y.exact.sigmoid()


def test_a_backward_that_multiplies_what_was_cast() -> None:
    """The gain must not go into the weight: the gradients would have it once too often."""
    model, x = FakeQuantized(), inputs(32)
    found, report = train(model, x, quantize="existing", verify=True)
    assert only_site(report).gain == "activation"
    assert_same_step(found, expected(model, x), F32)
    _, report = train(model, x, quantize="existing", gain="fold")
    assert only_site(report).reason is SkipReason.NO_WEIGHT_CAST
    assert "the backward of" in only_site(report).detail


# Norms that cannot become estimates keep their exact gradient


class Skipped(Program):
    """Its linear gets the casts that a skipped norm's linears get, unless nothing may be cast."""

    casts = True

    def normalized(self, x: Tensor, gain: Tensor | None = None) -> Any:
        return self.spelled(x)

    def spelled(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), self.norm.weight, EPS)

    def fused(self, y: Tensor, linear: nn.Linear | None = None) -> Tensor:
        if self.reference and self.casts:
            return functional.mx_linear(y, self.lin.weight)
        return self.lin(y)

    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        return self.fused(y), y.sigmoid()


class StatisticDetached(Skipped):
    """The RMS is a constant to the gradient."""

    def spelled(self, x: Tensor) -> Tensor:
        rho = torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + EPS)
        return x * rho * self.norm.weight


class RhoWithoutGradient(Skipped):
    def spelled(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x * rho * self.norm.weight


class HookInside(Skipped):
    def spelled(self, x: Tensor) -> Tensor:
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        rho.register_hook(lambda g: g * 0.5)
        return x * rho * self.norm.weight


class HookInsideAtTheEnd(Skipped):
    def spelled(self, x: Tensor) -> Tensor:
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        y = x * rho * self.norm.weight
        rho.register_hook(lambda g: g * 0.5)
        return y


class HookOnOneReadAtTheEnd(Skipped):
    def spelled(self, x: Tensor) -> Tensor:
        h = x * 1.0
        rho = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        g = h.view(h.shape)
        y = g * rho * self.norm.weight
        g.register_hook(lambda gradient: gradient * 0.5)
        return y


class HookOnAnEqualExpression(Skipped):
    """The statistic reads x, written once more, with a hook that is set behind it."""

    def spelled(self, x: Tensor) -> Tensor:
        h = x + 0.5
        rho = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        y = (x + 0.5) * rho * self.norm.weight
        h.register_hook(lambda g: g * 0.5)
        return y


class HookBehindACheckpoint(Skipped):
    """Set on what the checkpointed layer returns, it holds for the linear inside, too."""

    def forward(self, x: Tensor) -> Any:
        def layer(t: Tensor) -> Any:
            y = self.normalized(t)
            return y, self.fused(y)

        y, out = layer(x) if self.reference else checkpoint(layer, x, use_reentrant=False)
        return out, clip_gradient_by_hook(y).sigmoid()


class HookOnOneOfTwoReads(Skipped):
    def spelled(self, x: Tensor) -> Tensor:
        h = x * 1.0
        rho = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        g = h.view(h.shape)
        g.register_hook(lambda gradient: gradient * 0.5)
        return g * rho * self.norm.weight


class NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        # Saves no intermediate result; half of RMSNorm's gradient.
        x, w = ctx.saved_tensors
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        gw = g * w
        dx = rho * gw - x * rho.pow(3) * (gw * x).mean(-1, keepdim=True)
        return 0.5 * dx, (g * x * rho).reshape(-1, D).sum(0)


class InAFunction(Skipped):
    def spelled(self, x: Tensor) -> Tensor:
        return NormFunction.apply(x, self.norm.weight)


class InABranch(Skipped):
    casts = False

    def forward(self, x: Tensor) -> Any:
        if self.reference:
            return self.fused(self.normalized(x))
        return torch.cond(
            x.sum() > -1e9,
            lambda t: self.fused(self.normalized(t)),
            lambda t: t * 2,
            (x,),
        )


class OutputWrittenInPlace(Skipped):
    def spelled(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, (D,), self.norm.weight, EPS)
        y += 0.0
        return y

    casts = False


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (StatisticDetached, "gradients of their own"),
        (RhoWithoutGradient, "changes or stops its gradient"),
        (HookInside, "changes or stops its gradient"),
        (HookInsideAtTheEnd, "changes or stops its gradient"),
        (HookOnOneOfTwoReads, "gradients of their own"),
        (HookOnOneReadAtTheEnd, "changes or stops its gradient"),
        (HookOnAnEqualExpression, "the norm also reads"),
        (HookBehindACheckpoint, "in another body"),
        (InAFunction, "autograd_function_apply"),
        (InABranch, "a branch or a loop"),
    ],
)
def test_exact_gradients_where_a_norm_cannot_become_an_estimate(
    program: type[Skipped], words: str
) -> None:
    model, x = program(), inputs(32)
    found, report = train(model, x)
    site = only_site(report)
    assert (site.status, site.reason) == ("skipped", SkipReason.BACKWARD), str(site)
    assert words in site.detail, site.detail
    assert site.near_miss is not None
    assert_same_step(found, expected(model, x), F32)


# Derivatives taken inside


@pytest.mark.parametrize("kind", ["func.grad", "autograd.grad", "func.jvp", "func.vjp", "jacrev"])
def test_derivative_inside_of_the_compiled_function(kind: str) -> None:
    model, x = Skipped(), inputs(8)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tangent = torch.ones_like(x)

    def energy(t: Tensor) -> Tensor:
        return model.lin(model.norm(t)).sin().sum()

    def by_autograd(t: Tensor) -> Tensor:
        t = t.detach().requires_grad_()
        return torch.autograd.grad(energy(t), t)[0]

    function: Callable[[Tensor], Any] = {
        "func.grad": torch.func.grad(energy),
        "autograd.grad": by_autograd,
        "func.jvp": lambda t: torch.func.jvp(energy, (t,), (tangent,))[1],
        "func.vjp": lambda t: torch.func.vjp(energy, t)[1](torch.ones(()))[0],
        "jacrev": torch.func.jacrev(energy),
    }[kind]
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "quantize": "all"}
    with torch._dynamo.config.patch(trace_autograd_ops=True), mxnorm_pass.record() as report:
        got = torch.compile(function, backend="mxnorm", options=options)(x)
    assert {site.reason for site in report.sites} == {SkipReason.BACKWARD}
    torch.testing.assert_close(got, function(x))


def test_batching_inside_of_an_inference_graph_is_no_obstacle() -> None:
    model, x = Skipped(), inputs(4, 8)
    torch._dynamo.reset()
    batched = torch.func.vmap(lambda t: model.lin(model.norm(t)))
    with mxnorm_pass.record() as report, torch.no_grad():
        torch.compile(batched, backend="mxnorm", options={"inner": "aot_eager"})(x)
    assert only_site(report).reason is not SkipReason.BACKWARD, only_site(report).detail


def test_a_cast_that_feeds_fused_and_other_linears() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(D, eps=EPS)
            self.a, self.b = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)

        def forward(self, x: Tensor) -> Any:
            values, scales = torch.ops.mxnorm_pass.cast(self.norm(x).detach(), "mxfp8")
            y = torch.ops.mxnorm_pass.dequantize(values, scales, "mxfp8", F32)
            return self.a(y), self.b(y)

    torch._dynamo.reset()
    options = {"inner": "aot_eager", "quantize": "existing", "modules": {"b": False}}
    with mxnorm_pass.record() as report:
        torch.compile(Shared(), backend="mxnorm", options=options)(inputs(8).requires_grad_())
    assert only_site(report).reason is SkipReason.BACKWARD
