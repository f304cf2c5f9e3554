"""Specs of random training programs, and what they may do to a tensor on its way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gradient_programs import HalfGradient
from torch import Tensor

from mxnorm_pass import functional

D = 64
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class ReaderSpec:
    """What reads a norm.

    Attributes:
        kind: one of ``READERS``.
        steps: of ``STEPS``, between the norm and this reader alone.
        rows: of the weight.
        off: ``modules`` turns the linear off.
        checkpointed, without_gradient: how the reader is called.
    """

    kind: str
    steps: tuple[str, ...] = ()
    rows: int = D
    bias: bool = False
    trains: bool = True
    off: bool = False
    checkpointed: bool = False
    without_gradient: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One norm with what is around it.

    Attributes:
        source: what the layer reads, one of ``SOURCES``.
        before, after: steps on the norm's input, and on its output for all readers.
        spelling: one of ``SPELLINGS``.
        gain: one of ``GAINS``.
        has_module: the norm is in a module of its own; the gain may still be outside.
        upcast: "no", or where a bf16 stream is cast to fp32 and back, "inside" of the norm's
            module or "outside".
        wrapper: "none", "checkpoint", "region" or "branch".
        residual: what becomes of the readers' outputs, one of ``RESIDUALS``.
        late: hooks that are set when all readers are done, on the norm's input and its output.
        off: ``modules`` turns the norm off.
    """

    source: str = "stream"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    spelling: str = "rms_norm"
    gain: str = "own"
    has_module: bool = True
    upcast: str = "no"
    readers: tuple[ReaderSpec, ...] = (ReaderSpec("linear"),)
    wrapper: str = "none"
    residual: str = "add"
    off: bool = False
    eps: float = 1e-6
    late: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def has_router(self) -> bool:
        return any(reader.kind == "router" for reader in self.readers)

    @property
    def has_obstacle(self) -> bool:
        """May the norm stay as it is? Else a linear reads it, and nothing stands in the way."""
        harmless = {"view", "reshape", "unsqueeze", "contiguous", *HOOKS, "half function", "detach"}
        plain = (
            r.kind in ("linear", "inline")
            and not (r.off or r.checkpointed or r.without_gradient)
            and harmless.issuperset(r.steps)
            for r in self.readers
        )
        return (
            self.off
            or self.wrapper == "branch"
            or not harmless.issuperset(self.after)
            or not any(plain)
        )


@dataclass(frozen=True)
class ProgramSpec:
    """A model, its input and the options it is compiled with.

    Attributes:
        of_layer: for each layer which of ``specs`` it has; those of one spec share regions.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    specs: tuple[LayerSpec, ...]
    of_layer: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    x_trains: bool = True
    dynamic: bool = False


# What may be done to a tensor on its way


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class CubedGradient(torch.autograd.Function):
    """With a backward that reads what was saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.tanh()


class FakeQuantize(torch.autograd.Function):
    """An MX cast whose gradient is cut off where the input is large.

    Args:
        quantized: what the forward returns in the place of the cast of ``x``, for the reference.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        cast = functional.mx_dequantize(*functional.mx_cast(x), x.dtype)
        return cast if quantized is None else quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1), None


def _hooked(hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor]:
    def step(t: Tensor) -> Tensor:
        if t.requires_grad:
            t.register_hook(hook)
        return t

    return step


# Of these the elements of a row stay together, so that a row's cast goes along.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda t: t.view(t.shape),
    "reshape": lambda t: t.reshape(-1, t.shape[-1]),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "transpose": lambda t: t.unsqueeze(0).transpose(0, 1),
    "first rows": lambda t: t[:4],
    "chunk of rows": lambda t: t.chunk(2, 0)[-1],
    "contiguous": lambda t: t.contiguous(),
}
HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity hook": _hooked(lambda g: g * 1.0),
    "half hook": _hooked(lambda g: g * 0.5),
    "clipping hook": _hooked(lambda g: g.clamp(-0.1, 0.1)),
    "looking hook": _hooked(lambda g: None),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "half function": HalfGradient.apply,
    "straight-through function": StraightThrough.apply,
    "saving function": CubedGradient.apply,
}
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda t: t * 0.25,
    "negative": lambda t: -t,
    "row scale": lambda t: t * t.detach().abs().mean(-1, keepdim=True),
    "straight-through": lambda t: t + (t.round() - t).detach(),
    "tanh": lambda t: t.tanh(),
    "clone": lambda t: t.clone(),
}
STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda t: t.detach(),
    "detach and require": lambda t: t * 0.5 + t.detach(),
}
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "written": lambda t: t.mul_(0.5),
    "clone written": lambda t: t.clone().mul_(0.5),
}
STEPS = {**VIEWS, **HOOKS, **FUNCTIONS, **ELEMENTWISE, **STOPS, **WRITES}

SPELLINGS = ("rms_norm", "by hand", "huggingface")
GAINS = (
    "own", "own", "frozen", "buffer", "none", "one plus", "computed", "shared", "parent",
    "adaptive", "adaptive row", "function", "hooked",
)  # fmt: skip
LINEARS = ("linear", "inline", "fake", "router")
READERS = ("linear", "inline", "fake", "router", "sigmoid", "output", "product", "mean", "write")
SOURCES = ("stream", "input", "last norm")
RESIDUALS = ("add", "into out", "scaled", "alone", "in place")


def random_spec(seed: int) -> ProgramSpec:
    return _Draw(random.Random(seed)).program()


class _Draw:
    """Draws specs; what eager PyTorch refuses is not drawn."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def maybe(self, chance: float) -> bool:
        return self.rng.random() < chance

    def program(self) -> ProgramSpec:
        rng = self.rng
        dtype = BF16 if self.maybe(0.25) else F32
        specs = tuple(self.layer(i, dtype) for i in range(rng.choice((1, 1, 2, 2, 3))))
        of_layer: list[int] = []
        for i, spec in enumerate(specs):
            of_layer += [i] * (2 if spec.wrapper == "region" or self.maybe(0.1) else 1)
        shape = rng.choice(((8, D), (16, D), (1, 8, D), (2, 8, D), (4, 4, D)))
        return ProgramSpec(
            dtype=dtype,
            shape=shape,
            specs=specs,
            of_layer=tuple(of_layer),
            options=self.options(),
            x_trains=self.maybe(0.85),
            dynamic=self.maybe(0.1),
        )

    def options(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "quantize": rng.choice(("norm-fed", "norm-fed", "all")),
            "gradient": rng.choice(("true", "true", "true", "orthogonal", "paper")),
            "gain": rng.choice(("auto", "auto", "activation")),
            "estimator": rng.choice(("mxnorm",) * 6 + ("exact",)),
            "p": rng.choice((2.0, 2.0, 1.0, 3.0)),
            "verify": self.maybe(0.15),
        }

    def steps(self, chance: float, *kinds: dict[str, Any]) -> tuple[str, ...]:
        names = [name for kind in kinds for name in kind]
        found = []
        while self.maybe(chance):
            found.append(self.rng.choice(names))
            chance *= 0.4
        return tuple(found)

    def layer(self, number: int, dtype: torch.dtype) -> LayerSpec:
        rng = self.rng
        wrapper = rng.choice(("none",) * 7 + ("checkpoint", "region", "branch"))
        # Dynamo traces no hooks in other bodies.
        hooks = HOOKS if wrapper in ("none", "checkpoint") else {}
        functions = FUNCTIONS if wrapper in ("none", "checkpoint") else {}
        upcast = rng.choice(("no", "inside", "outside", "outside")) if dtype == BF16 else "no"
        before = self.steps(0.3, hooks, functions, ELEMENTWISE, VIEWS, STOPS)
        after = self.steps(0.35, hooks, hooks, functions, VIEWS, VIEWS, STOPS, ELEMENTWISE)
        if self.maybe(0.05) and wrapper == "none":
            after = (*after, rng.choice(list(WRITES)))
        readers = tuple(
            self.reader(wrapper, hooks, functions) for _ in range(rng.choice((1, 2, 2, 3)))
        )
        if not any(r.kind in ("linear", "inline") and not r.off for r in readers):
            readers = (ReaderSpec("linear"), *readers)
        residuals = [r for r in RESIDUALS if r != "in place" or (upcast == "outside")]
        in_body = wrapper in ("region", "branch")
        return LayerSpec(
            source="stream" if in_body else rng.choice(("stream",) * 4 + SOURCES),
            before=before,
            after=after,
            spelling=rng.choice(SPELLINGS),
            gain=rng.choice([g for g in GAINS if hooks or g not in ("function", "hooked")]),
            has_module=self.maybe(0.8),
            upcast=upcast,
            readers=readers,
            wrapper=wrapper,
            residual="add" if in_body else rng.choice(residuals),
            off=self.maybe(0.05),
            eps=rng.choice((1e-6, 1e-2)),
            late=(self.steps(0.1, hooks), self.steps(0.15, hooks)) if hooks else ((), ()),
        )

    def reader(self, wrapper: str, hooks: dict[str, Any], functions: dict[str, Any]) -> ReaderSpec:
        rng = self.rng
        # Branches cannot write to what they are given; what is checkpointed would do so twice.
        others = READERS[2:] if wrapper == "none" else READERS[3:-1]
        kind = rng.choice(("linear",) * 6 + ("inline",) * 2 + others)
        return ReaderSpec(
            kind=kind,
            steps=self.steps(0.3, hooks, functions, VIEWS, VIEWS, ELEMENTWISE, STOPS),
            rows=rng.choice((D, D, 32, 96)) if kind != "router" else 32,
            bias=self.maybe(0.3),
            trains=self.maybe(0.85),
            off=self.maybe(0.2),
            checkpointed=kind != "write" and self.maybe(0.1),
            without_gradient=self.maybe(0.08),
        )
