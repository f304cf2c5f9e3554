"""Models with a norm between hooks, casts, checkpoints and the like, and what they must compute.

Each says itself what that is: ``forward`` with a function for the norm and one for the linears,
exact in the model and from ``functional`` in the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matching import BF16, F32, GRADIENT_TOLERANCE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mxnorm_pass
from mxnorm_pass import Report, functional

EPS = 1e-6
D = 64


class Estimated:
    """A tensor that one kind of reader sees as the exact norm, the other as the estimate."""

    def __init__(self, exact: Tensor, estimate: Tensor, quantized: Any, gain: Any) -> None:
        self.exact, self.estimate = exact, estimate
        self.quantized, self.gain = quantized, gain

    def map(self, function: Callable[[Tensor], Tensor]) -> Estimated:
        """Both, through what a model does between norm and readers."""
        return Estimated(function(self.exact), function(self.estimate), self.quantized, self.gain)


class Program(nn.Module):
    """A norm, what is done to its output, and its readers.

    ``reads`` returns the outputs, given the norm's output; ``self.fused`` and ``self.exact`` read
    it, the first through a linear that is fused.
    """

    def __init__(self, dtype: torch.dtype = F32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(D, eps=EPS)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.lin = nn.Linear(D, D, bias=False, dtype=dtype)
        self.off = nn.Linear(D, D, bias=False, dtype=dtype)
        self.reference = False

    def normalized(self, x: Tensor, gain: Tensor | None = None) -> Any:
        gain = self.norm.weight if gain is None else gain
        flat = gain.reshape(-1)
        exact = F.rms_norm(x, (D,), flat, EPS)
        if not self.reference:
            return exact
        estimate = functional.mxnorm(x, flat, eps=EPS)
        return Estimated(exact, estimate, functional.mxnorm_cast(x, eps=EPS)[:2], flat)

    def step(self, y: Any, function: Callable[[Tensor], Tensor]) -> Any:
        return y.map(function) if isinstance(y, Estimated) else function(y)

    def fused(self, y: Any, linear: nn.Linear | None = None) -> Tensor:
        linear = linear or self.lin
        if not isinstance(y, Estimated):
            return linear(y)
        quantized = tuple(t.reshape(*y.estimate.shape[:-1], -1) for t in y.quantized)
        return functional.mx_linear(y.estimate, linear.weight, quantized=quantized, gain=y.gain)

    def exact(self, y: Any) -> Tensor:
        return y.exact if isinstance(y, Estimated) else y

    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError


class HookOnTheOutput(Program):
    def forward(self, x: Tensor) -> Any:
        y = self.step(self.normalized(x), scale_gradient_by_hook)
        return self.fused(y) + self.exact(y).sigmoid()


class ClippingHook(Program):
    """A hook that is not linear."""

    def forward(self, x: Tensor) -> Any:
        y = self.step(self.normalized(x), clip_gradient_by_hook)
        return self.fused(y) + self.exact(y).sigmoid()


class HookBehindTheReader(Program):
    """A hook is the tensor's, whoever has read it before."""

    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        out = self.fused(y)
        self.step(y, clip_gradient_by_hook)
        return out, self.exact(y).sigmoid()


class HookOnTheSameTensor(Program):
    """Some ops return the tensor that they are given."""

    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        z = self.step(y, lambda t: clip_gradient_by_hook(t.contiguous().float()))
        return self.fused(y), self.exact(z).sigmoid()


class HookThatReadsTheNorm(Program):
    def forward(self, x: Tensor) -> Any:
        def hooked(y: Tensor) -> Tensor:
            y.register_hook(lambda g: g * y.detach().abs().clamp(0, 1))
            return y

        y = self.normalized(x)
        out = self.fused(y)
        self.step(y, hooked)
        return out, self.exact(y).sigmoid()


class HookOnTheInput(Program):
    def forward(self, x: Tensor) -> Any:
        h = x * 2
        h.register_hook(lambda g: g * 3)
        y = self.normalized(h)
        return self.fused(y) + self.exact(y).sigmoid()


class CastOutside(Program):
    """An fp32 norm whose cast stands outside of its module; one reader is off."""

    def __init__(self) -> None:
        super().__init__(BF16)

    def forward(self, x: Tensor) -> Any:
        y = self.step(self.normalized(x.float()), lambda t: t.bfloat16())
        return self.fused(y), self.off(self.exact(y))


class GainInTheParent(Program):
    """As adaptive norms have it, with one row of conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.ada = nn.Linear(D, D)
        self.plain = nn.RMSNorm(D, eps=EPS, elementwise_affine=False)

    def forward(self, x: Tensor) -> Any:
        scale = 1 + self.ada(torch.linspace(-2, 2, D)[None])[:, None]
        if self.reference:
            return self.fused(self.normalized(x, scale))
        return self.fused(self.plain(x) * scale)


class Detached(Program):
    """A reader whose gradient is stopped, beside one that is fused."""

    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        return self.fused(y), self.off(self.exact(y).detach())


class FusedReaderDetached(Program):
    """The fused reader is the one that stops the gradient."""

    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        return self.fused(self.step(y, Tensor.detach)), self.exact(y).sigmoid()


class DetachedInPlace(Program):
    """Which Dynamo's nodes behind it do not read."""

    def forward(self, x: Tensor) -> Any:
        y = self.step(self.normalized(x), Tensor.detach_)
        return self.fused(y), self.exact(y).sigmoid() + x


class Thresholds(Program):
    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        with torch.no_grad():
            top = self.exact(y).abs().amax()
        return self.fused(y), (self.exact(y) > 1).float().mean(), top


class ScaledBranch(Program):
    """One reader behind an op that changes its share of the gradient."""

    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        return self.fused(y), self.off(self.exact(y) * 0.25)


class FunctionOnTheWay(Program):
    """An autograd.Function that is the identity, but for its gradient."""

    def forward(self, x: Tensor) -> Any:
        y = self.step(self.normalized(x), HalfGradient.apply)
        return self.fused(y), self.exact(y).sigmoid()


class CheckpointedReaders(Program):
    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        if self.reference:
            return self.fused(y), self.exact(y).sigmoid()
        return checkpoint(self.lin, y, use_reentrant=False), y.sigmoid()


class CheckpointedWhole(Program):
    def forward(self, x: Tensor) -> Any:
        def layer(t: Tensor) -> Tensor:
            y = self.normalized(t)
            return self.fused(y) + self.exact(y).sigmoid()

        return layer(x) if self.reference else checkpoint(layer, x, use_reentrant=False)


class ReadBehindACheckpoint(Program):
    """The norm's output leaves the checkpointed layer in which a fused linear reads it."""

    def forward(self, x: Tensor) -> Any:
        def layer(t: Tensor) -> Any:
            y = self.normalized(t)
            return y, self.fused(y)

        y, out = layer(x) if self.reference else checkpoint(layer, x, use_reentrant=False)
        return out, self.exact(y).sigmoid()


class WrittenInPlace(Program):
    """The residual stream is written to behind the norm, as x += f(norm(x)) does."""

    def __init__(self) -> None:
        super().__init__(BF16)

    def forward(self, x: Tensor) -> Any:
        h = x.bfloat16()
        y = self.step(self.normalized(h.float()), lambda t: t.bfloat16())
        out = self.fused(y)
        h = h + out if self.reference else h.add_(out)
        return h, self.exact(y).sigmoid()


class TwoStreams(Program):
    """One linear reads two norms of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.RMSNorm(D, eps=EPS)
        nn.init.uniform_(self.other.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Any:
        y = self.normalized(x)
        z = self.normalized(x.tanh(), self.other.weight)
        return self.fused(y) + self.fused(z), self.exact(y) * self.exact(z)


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


def scale_gradient_by_hook(y: Tensor) -> Tensor:
    y.register_hook(lambda g: g * 0.5)
    return y


def clip_gradient_by_hook(y: Tensor) -> Tensor:
    y.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return y


def inputs(*shape: int) -> Tensor:
    x = torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))
    # Blocks of unlike scales, where the estimate's gradient is far from the exact norm's.
    x[..., :4] *= 5
    return x


def step(function: Callable[..., Any], model: Program, x: Tensor) -> dict[str, Tensor]:
    """Outputs and all gradients."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    outputs = function(leaf)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = torch.Generator().manual_seed(2)
    loss = sum(
        (y.float() * torch.randn(y.shape, generator=random)).sum()
        for y in outputs
        if y.requires_grad
    )
    loss.backward()
    found = {f"out {i}": y.detach() for i, y in enumerate(outputs)} | {"x": leaf.grad}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in found.items()}


def train(model: Program, x: Tensor, **options: Any) -> tuple[dict[str, Tensor], Report]:
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "modules": {"off": False}, **options}
    compiled = torch.compile(model, backend="mxnorm", options=options)
    with mxnorm_pass.record() as report:
        found = step(compiled, model, x)
    return found, report


def expected(model: Program, x: Tensor) -> dict[str, Tensor]:
    model.reference = True
    try:
        return step(model, model, x)
    finally:
        model.reference = False


def assert_same_step(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype
) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = float((found[name].double() - value.double()).norm() / value.double().norm())
        assert error <= GRADIENT_TOLERANCE[dtype], f"{name}: {error}"


# All that is fused.
FUSED = [
    HookOnTheOutput,
    ClippingHook,
    HookBehindTheReader,
    HookOnTheSameTensor,
    HookThatReadsTheNorm,
    HookOnTheInput,
    CastOutside,
    GainInTheParent,
    Detached,
    FusedReaderDetached,
    DetachedInPlace,
    Thresholds,
    ScaledBranch,
    FunctionOnTheWay,
    CheckpointedReaders,
    CheckpointedWhole,
    ReadBehindACheckpoint,
    WrittenInPlace,
    TwoStreams,
]
