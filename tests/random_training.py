"""Random training programs, and what each must compute: outputs and every gradient.

A program is a model of a few norms with all that may surround them: hooks, Functions, detached and
scaled readers, gains from elsewhere, shared bodies, branches, checkpoints. Its reference is the
same program in eager mode, in which those readers that the report calls fused see the norm by
``functional`` and all others see the exact one.

``python tests/random_training.py COUNT [FIRST]`` runs that many programs and prints the failures.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mxnorm_pass
from mxnorm_pass import Report, Site, SkipReason, functional, insert

D = 64
BF16, F32 = torch.bfloat16, torch.float32
# Relative norm. Sums of gradients in another order differ by the last bit, and bf16 has 8.
TOLERANCE = {F32: 1e-5, BF16: 1e-2}


# Specs


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


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


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


# The model


@dataclass(frozen=True)
class Oracle:
    """What the report says of the model, for the reference.

    Attributes:
        sites: of the fused norms, by number of the layer.
        cast: names of the linears that the backend has given casts.
    """

    spec: ProgramSpec
    sites: dict[int, Site]
    cast: frozenset[str]

    def is_cast(self, layer: int, name: str) -> bool:
        """Layers of one body have the names of the first of them."""
        kind = self.spec.of_layer[layer]
        shared = self.spec.specs[kind].wrapper == "region"
        alike = [i for i, k in enumerate(self.spec.of_layer) if k == kind] if shared else [layer]
        return any(_is_in(f"layers.{i}.{name}", found) for i in alike for found in self.cast)

    def is_fused(self, layer: int, name: str) -> bool:
        site = self.sites.get(layer)
        if site is None or site.estimator != "mxnorm":
            return False
        return any(_is_in(f"layers.{layer}.{name}", found) for found in site.consumers)


def _is_in(module: str, name: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@dataclass(frozen=True)
class Seen:
    """A norm's output as readers see it in the reference: exact, or the estimate and its cast."""

    exact: Tensor
    estimate: Tensor
    quantized: tuple[Tensor, Tensor]
    folded: Tensor | None

    def step(self, name: str) -> Seen:
        function = STEPS[name]
        quantized = self.quantized
        if name in VIEWS:
            quantized = (function(quantized[0]), function(quantized[1]))
        return Seen(function(self.exact), function(self.estimate), quantized, self.folded)

    def to(self, dtype: torch.dtype) -> Seen:
        return Seen(self.exact.to(dtype), self.estimate.to(dtype), self.quantized, self.folded)


def _take_steps(value: Any, steps: tuple[str, ...]) -> Any:
    for name in steps:
        value = value.step(name) if isinstance(value, Seen) else STEPS[name](value)
    return value


class Reader(nn.Module):
    def __init__(self, spec: ReaderSpec, dtype: torch.dtype, place: tuple[int, int]) -> None:
        super().__init__()
        self.spec, self.layer, self.name = spec, place[0], f"readers.{place[1]}"
        self.oracle: Oracle | None = None
        if spec.kind in LINEARS:
            self.linear = nn.Linear(D, spec.rows, bias=spec.bias, dtype=dtype)
            self.linear.weight.requires_grad_(spec.trains)

    def forward(self, y: Any, state: Tensor | None) -> Tensor:
        y = _take_steps(y, self.spec.steps)
        if self.spec.without_gradient:
            with torch.no_grad():
                return self.read(y, state)
        if self.spec.checkpointed and self.oracle is None:
            return checkpoint(self.read, y, use_reentrant=False)
        return self.read(y, state)

    def read(self, y: Any, state: Tensor | None = None) -> Tensor:
        if self.spec.kind in LINEARS:
            out = self.multiply(y)
            return torch.softmax(out, -1).topk(2).values if self.spec.kind == "router" else out
        exact: Tensor = y.exact if isinstance(y, Seen) else y
        if self.spec.kind == "sigmoid":
            return exact.sigmoid()
        if self.spec.kind == "product":
            flat = exact.reshape(-1, exact.shape[-1])
            return flat @ flat.t()
        if self.spec.kind == "mean":
            return (exact.abs() > 1).float().mean() + exact.float().mean()
        if self.spec.kind == "write" and state is not None:
            state.add_(exact.detach().reshape(-1, D).float().mean(0))
            return exact.float().sum(-1)
        return exact

    def multiply(self, y: Any) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        y = y.to(weight.dtype)
        if self.spec.kind == "fake":
            return self.multiply_fake_quantized(y)
        if self.oracle is None:
            return F.linear(y, weight, bias) if self.spec.kind == "inline" else self.linear(y)
        if isinstance(y, Seen) and self.oracle.is_fused(self.layer, self.name):
            return functional.mx_linear(
                y.estimate, weight, bias, quantized=y.quantized, gain=y.folded
            )
        exact = y.exact if isinstance(y, Seen) else y
        if self.oracle.is_cast(self.layer, self.name):
            return functional.mx_linear(exact, weight, bias)
        return F.linear(exact, weight, bias)

    def multiply_fake_quantized(self, y: Any) -> Tensor:
        is_fused = self.oracle is not None and self.oracle.is_fused(self.layer, self.name)
        if isinstance(y, Seen) and is_fused and y.folded is not None:
            # The gain is folded where there is no backward alone.
            with torch.no_grad():
                return functional.mx_linear(
                    y.estimate,
                    self.linear.weight,
                    self.linear.bias,
                    quantized=y.quantized,
                    gain=y.folded,
                )
        weight = FakeQuantize.apply(self.linear.weight, None)
        if not isinstance(y, Seen):
            activation = FakeQuantize.apply(y, None)
        elif is_fused:
            quantized = functional.mx_dequantize(*y.quantized, y.estimate.dtype)
            activation = FakeQuantize.apply(y.estimate, quantized)
        else:
            activation = FakeQuantize.apply(y.exact, None)
        return F.linear(activation, weight, self.linear.bias)


class Norm(nn.Module):
    """x / rms, with the gain that it is given."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, gain: Tensor | None) -> Tensor:
        upcast = self.spec.upcast == "inside"
        y = normalized(self.spec, x.float() if upcast else x, gain)
        return y.to(BF16) if upcast else y


def normalized(spec: LayerSpec, x: Tensor, gain: Tensor | None) -> Tensor:
    # Eager mode has a kernel of its own for it, which rounds otherwise than what it is traced to;
    # the last bit of one norm decides about roundings to float8 behind the next.
    if spec.spelling == "rms_norm" and torch.compiler.is_compiling():
        if gain is None or gain.shape == (D,):
            return F.rms_norm(x, (D,), gain, spec.eps)
        return F.rms_norm(x, (D,), None, spec.eps) * gain
    h = x.float()
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + spec.eps)
    if spec.spelling == "huggingface":
        y = y.to(x.dtype)
        return y if gain is None else gain * y
    y = y if gain is None else y * gain
    return y.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, program: ProgramSpec, number: int, first: Layer | None) -> None:
        super().__init__()
        self.spec = spec = program.specs[program.of_layer[number]]
        self.number, self.dtype, self.options = number, program.dtype, program.options
        self.oracle: Oracle | None = None
        self.norm = Norm(spec)
        narrow = BF16 if spec.upcast != "no" else program.dtype
        self.readers = nn.ModuleList(
            Reader(r, narrow, (number, j)) for j, r in enumerate(spec.readers)
        )
        gain = torch.rand(D) + 0.5
        gain = gain.to(F32 if spec.upcast != "no" else program.dtype)
        if spec.gain == "shared" and first is not None and first.weight is not None:
            if first.weight.dtype == gain.dtype:
                gain = first.weight
        self.weight: Tensor | None
        if spec.gain == "buffer":
            self.register_buffer("weight", gain)
        elif spec.gain == "none":
            self.weight = None
        else:
            trains = spec.gain != "frozen"
            own = gain if isinstance(gain, nn.Parameter) else nn.Parameter(gain, trains)
            self.weight = own
        if spec.gain.startswith("adaptive"):
            self.ada = nn.Linear(D, D, dtype=program.dtype)

    def gain(self, condition: Tensor) -> Tensor | None:
        kind, weight = self.spec.gain, self.weight
        if weight is None:
            return None
        if kind == "one plus":
            return 1.0 + weight
        if kind == "computed":
            return weight * 0.5 + 0.25
        if kind == "function":
            return HalfGradient.apply(weight)
        if kind == "hooked":
            return HOOKS["half hook"](weight * 1.0)
        if kind == "adaptive":
            return 1 + self.adapted(condition)[0]
        if kind == "adaptive row":
            return 1 + self.adapted(condition)
        return weight

    def adapted(self, condition: Tensor) -> Tensor:
        if self.oracle is not None and self.oracle.is_cast(self.number, "ada"):
            return functional.mx_linear(condition, self.ada.weight, self.ada.bias)
        return self.ada(condition)

    def forward(self, x: Tensor, condition: Tensor, state: Tensor) -> tuple[Any, ...]:
        wrapper = self.spec.wrapper if self.oracle is None else "none"
        if wrapper == "checkpoint":
            return checkpoint(self.body, x, condition, use_reentrant=False)
        if wrapper == "region":
            return self.region(x, condition)
        if wrapper == "branch":
            return torch.cond(
                x.detach().sum() > -1e9,
                # Results of branches must alias nothing.
                lambda a, b: tuple(t * 1.0 for t in self.body(a, b)),
                lambda a, b: tuple(t * 0.5 for t in self.body(a, b)),
                (x, condition),
            )
        return self.body(x, condition, state)

    @torch.compiler.nested_compile_region
    def region(self, x: Tensor, condition: Tensor) -> tuple[Any, ...]:
        return self.body(x, condition)

    def body(self, x: Tensor, condition: Tensor, state: Tensor | None = None) -> tuple[Any, ...]:
        """The norm's output as other readers see it, then what the readers make of it."""
        source = _take_steps(x, self.spec.before)
        y = self.normalize(source, condition)
        y = _take_steps(y, self.spec.after)
        outputs = [reader(y, state) for reader in self.readers]
        for tensor, hooks in zip((source, y), self.spec.late, strict=True):
            _take_steps(tensor, hooks)
        return (y.exact if isinstance(y, Seen) else y) * 1.0, *outputs

    def normalize(self, x: Tensor, condition: Tensor) -> Any:
        gain = self.gain(condition)
        if self.spec.upcast == "outside":
            x = x.float()
        exact = self.exact(x, gain)
        site = self.oracle.sites.get(self.number) if self.oracle is not None else None
        if site is not None and site.estimator == "mxnorm":
            return self.seen(x, gain, exact, site)
        return exact

    def exact(self, x: Tensor, gain: Tensor | None) -> Tensor:
        outside = self.spec.gain == "parent" or self.spec.gain == "adaptive row"
        inner = None if outside else gain
        if self.spec.has_module:
            y = self.norm(x, inner)
        else:
            y = (
                self.norm.forward(x, inner)
                if self.spec.upcast == "inside"
                else normalized(self.spec, x, inner)
            )
        if outside and gain is not None:
            y = y * gain
        return y.to(BF16) if self.spec.upcast == "outside" else y

    def seen(self, x: Tensor, gain: Tensor | None, exact: Tensor, site: Site) -> Seen:
        outside = self.spec.gain == "parent" or self.spec.gain == "adaptive row"
        flat = gain.reshape(-1) if gain is not None else None
        x = x.float() if self.spec.upcast == "inside" else x
        rounds = (self.spec.spelling == "huggingface" or outside) and x.dtype != F32
        options = {"eps": self.spec.eps, "p": self.options["p"]}
        estimate = functional.mxnorm(
            x,
            flat,
            gradient=self.options["gradient"],
            norm_dtype=x.dtype if rounds else None,
            out_dtype=exact.dtype,
            **options,
        )
        in_cast = flat if site.gain == "activation" else None
        values, scales, _ = functional.mxnorm_cast(x, in_cast, **options)
        folded = flat if site.gain == "fold" else None
        shape = exact.shape[:-1]
        quantized = values.reshape(exact.shape), scales.reshape(*shape, -1)
        return Seen(exact, estimate.reshape(exact.shape), quantized, folded)


class Program(nn.Module):
    def __init__(self, spec: ProgramSpec, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.spec = spec
        layers: list[Layer] = []
        for number in range(len(spec.of_layer)):
            layers.append(Layer(spec, number, layers[0] if layers else None))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, condition: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        stream = x * 1.0
        first, last = stream, stream
        results: list[Tensor] = []
        for layer in self.layers:
            source = {"stream": stream, "input": first, "last norm": last}[layer.spec.source]
            y, *outputs = layer(source, condition, state)
            last = y.reshape(stream.shape).to(stream.dtype) if _fits(y, stream) else last
            results += [t for t in outputs if not _fits(t, stream)]
            for i, out in enumerate(t for t in outputs if _fits(t, stream)):
                residual = layer.spec.residual if i == 0 else "add"
                if residual == "alone":
                    results.append(stream * 1.0)
                stream = _joined(residual, stream, out.reshape(stream.shape))
        return stream, *results

    def under(self, oracle: Oracle | None) -> None:
        for module in self.modules():
            if isinstance(module, (Layer, Reader)):
                module.oracle = oracle


def _fits(t: Tensor, stream: Tensor) -> bool:
    return t.shape[-1:] == stream.shape[-1:] and t.numel() == stream.numel()


def _joined(residual: str, stream: Tensor, out: Tensor) -> Tensor:
    out = out.to(stream.dtype)
    if residual == "into out":
        return out.clone().add_(stream)
    if residual == "scaled":
        return stream * 0.5 + out * 0.7
    if residual == "alone":
        return out * 1.0
    return stream.add_(out) if residual == "in place" else stream + out


# Runs


@dataclass(frozen=True)
class Outcome:
    """What one program has come to.

    Attributes:
        unsupported: plain ``aot_eager`` fails on it, too; or eager mode does.
        errors: relative differences that are too large, by the name of output or gradient.
    """

    spec: ProgramSpec
    report: Report | None
    unsupported: str = ""
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def refused(self) -> tuple[Site, ...]:
        """The norms that are skipped though nothing is in their way."""
        if self.report is None:
            return ()
        specs = [self.spec.specs[kind] for kind in self.spec.of_layer]
        # Under dynamic=True Dynamo makes an input of eps, and in a body no constant any more.
        excused = {SkipReason.EPS_INPUT} if self.spec.dynamic else set()
        if any(spec.has_router for spec in specs):
            # A linear that leads to a router is part of it.
            excused.add(SkipReason.NO_MX_CAST)
        return tuple(
            site
            for site in self.report.skipped
            if not specs[_layer_of(site.norm)].has_obstacle and site.reason not in excused
        )


def run_program(spec: ProgramSpec, seed: int = 0) -> Outcome:
    model = Program(spec, seed)
    try:
        step(model, model, spec)
    except Exception as error:
        return Outcome(spec, None, unsupported=f"eager: {error}")
    torch._dynamo.reset()
    try:
        with mxnorm_pass.record() as report, recorded_casts() as cast:
            found = step(_compiled(model, spec), model, spec)
    except Exception as error:
        plain = _failure_of_plain(model, spec)
        if plain is None:
            raise
        if type(plain) is not type(error):
            raise
        return Outcome(spec, None, unsupported=str(plain))
    sites = {_layer_of(site.norm): site for site in report.fused}
    model.under(Oracle(spec, sites, frozenset(cast)))
    wanted = step(model, model, spec)
    model.under(None)
    errors = _errors(found, wanted, spec.dtype)
    if errors and _plain_is_wrong(model, spec):
        return Outcome(spec, None, unsupported=f"plain aot_eager is wrong, too: {errors}")
    return Outcome(spec, report, errors=errors)


def _compiled(model: Program, spec: ProgramSpec) -> Any:
    modules: dict[str, bool] = {}
    for number, kind in enumerate(spec.of_layer):
        layer = spec.specs[kind]
        if layer.off:
            modules[f"layers.{number}.norm"] = False
        for j, reader in enumerate(layer.readers):
            if reader.off:
                modules[f"layers.{number}.readers.{j}*"] = False
    options = {"inner": "aot_eager", "modules": modules, **spec.options}
    return torch.compile(
        model, backend="mxnorm", options=options, dynamic=spec.dynamic or None, fullgraph=True
    )


def _plain_step(model: Program, spec: ProgramSpec) -> dict[str, Tensor]:
    torch._dynamo.reset()
    dynamic = spec.dynamic or None
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    return step(compiled, model, spec)


def _failure_of_plain(model: Program, spec: ProgramSpec) -> Exception | None:
    try:
        _plain_step(model, spec)
    except Exception as error:
        return error
    return None


def _plain_is_wrong(model: Program, spec: ProgramSpec) -> bool:
    return bool(_errors(_plain_step(model, spec), step(model, model, spec), spec.dtype))


@contextmanager
def recorded_casts() -> Iterator[set[str]]:
    """Names of the linears that the backend gives casts meanwhile."""
    found: set[str] = set()
    original = insert._quantize

    def quantize(graph: Any, linear: Any, fmt: Any) -> None:
        found.add(linear.name)
        original(graph, linear, fmt)

    with mock.patch.object(insert, "_quantize", quantize):
        yield found


def _layer_of(norm: str) -> int:
    return int(norm.split(".")[1])


def step(function: Callable[..., Any], model: Program, spec: ProgramSpec) -> dict[str, Tensor]:
    """Outputs, what was written, and all gradients."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(spec.shape, generator=generator)
    # Blocks of unlike scales, where the estimate's gradient is far from the exact norm's.
    x[..., :4] *= 5
    x = x.to(spec.dtype).requires_grad_(spec.x_trains)
    condition = torch.linspace(-1, 1, D)[None].to(spec.dtype)
    state = torch.zeros(D)
    outputs = function(x, condition, state)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    trained = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if trained:
        torch.autograd.backward(*zip(*trained, strict=True))
    found = {f"out {i}": y.detach() for i, y in enumerate(outputs)} | {"state": state}
    leaves = {"x": x, **dict(model.named_parameters())}
    found |= {n: p.grad for n, p in leaves.items() if p.grad is not None}
    return {name: value.clone() for name, value in found.items()}


def _errors(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """What differs; a gradient that is missing is zero."""
    errors: dict[str, float] = {}
    for name in {**found, **wanted}:
        a, b = found.get(name), wanted.get(name)
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        if a.shape != b.shape or a.dtype != b.dtype:
            errors[name] = float("inf")
            continue
        scale = max(float(a.double().norm()), float(b.double().norm()))
        error = float((a.double() - b.double()).norm()) / scale if scale else 0.0
        if not error <= TOLERANCE[dtype]:
            errors[name] = error
    return errors


def main(count: int, first: int = 0) -> int:
    statuses: Counter[str] = Counter()
    failures: list[int] = []
    start = time.perf_counter()
    for seed in range(first, first + count):
        spec = random_spec(seed)
        try:
            outcome = run_program(spec, seed)
        except Exception:
            failures.append(seed)
            print(f"seed {seed}: {spec}\n{traceback.format_exc(limit=-6)[-3000:]}", flush=True)
            continue
        if outcome.unsupported:
            statuses["unsupported"] += 1
            print(f"seed {seed}: unsupported: {outcome.unsupported[:150]!r}", flush=True)
            continue
        assert outcome.report is not None
        for site in outcome.report.sites:
            statuses[site.status if site.reason is None else f"{site.reason.name}"] += 1
        for site in outcome.refused:
            print(f"seed {seed}: refused: {spec.specs[spec.of_layer[_layer_of(site.norm)]]} {site}")
        statuses["refused"] += len(outcome.refused)
        if outcome.errors:
            failures.append(seed)
            print(f"seed {seed}: {spec}\n{outcome.report}\n{outcome.errors}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{count} programs from {first}: {dict(statuses)}, {seconds:.0f} s, failures {failures}")
    return len(failures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
