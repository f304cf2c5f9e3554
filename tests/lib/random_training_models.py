"""The models that specs of random training programs describe, and their reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from random_training_specs import (
    BF16,
    F32,
    HOOKS,
    LINEARS,
    STEPS,
    VIEWS,
    D,
    FakeQuantize,
    HalfGradient,
    LayerSpec,
    ProgramSpec,
    ReaderSpec,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mxnorm_pass import Site, functional


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
