"""The models that random specs describe, and what each must compute.

A model knows how many norms it has; :class:`Reference` evaluates it in eager mode, with what the
report calls fused replaced by ``mxnorm_pass.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hand_casts import HAND_CASTS, CastLinear
from matching import BF16, SPELLINGS, Norm, inputs, rms_norm
from random_specs import (
    KEEP_THE_NORM,
    NEAR_MISSES,
    SOURCES,
    VIEWS,
    ModelSpec,
    NormSpec,
    ReaderSpec,
    StageSpec,
)
from reference import (
    MXBackward,
    Recipe,
    convert_to_mxfp8_training,
    quantize_with_torchao,
    torchao_mode,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mxnorm_pass import Report, Site, SkipReason, functional
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.options.config import MXNormConfig

OTHER_ROWS = 24


class Reader(nn.Module):
    """Anything that reads a norm; this one returns it."""

    def __init__(self, spec: ReaderSpec, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, y: Tensor, other: Tensor) -> Tensor:
        return y


class Elementwise(Reader):
    def forward(self, y: Tensor, other: Tensor) -> Tensor:
        return torch.sigmoid(y)


class Product(Reader):
    """Of two activations, as attention scores."""

    def forward(self, y: Tensor, other: Tensor) -> Tensor:
        return y @ other.to(y.dtype).t()


class Transposed(Reader):
    """A linear over tokens."""

    def __init__(self, spec: ReaderSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        self.mix = nn.Linear(shape[-2], 48, bias=spec.bias, dtype=spec.dtype)

    def forward(self, y: Tensor, other: Tensor) -> Tensor:
        return self.mix(y.to(self.spec.dtype).transpose(-1, -2))


class Linear(Reader):
    def __init__(self, spec: ReaderSpec, shape: tuple[int, ...]) -> None:
        super().__init__(spec, shape)
        width = shape[-1] // 2 if spec.view == "halves" else shape[-1]
        has_bias = spec.bias and spec.cast != "torchao inference"
        linear = nn.Linear(width, spec.rows or width, bias=has_bias, dtype=spec.dtype)
        self.linear = _with_own_casts(linear, spec)
        if spec.cast != "torchao inference":
            self.linear.weight.requires_grad_(spec.trains)

    def operand(self, y: Tensor) -> Tensor:
        y = VIEWS[self.spec.view](y.to(self.spec.dtype))
        if self.spec.cast == "torchao training":
            # It refuses some shapes of more dimensions.
            y = y.flatten(0, -2)
        return y if self.spec.gradient == "kept" else y.detach()

    def forward(self, y: Tensor, other: Tensor) -> Tensor:
        if self.spec.gradient == "off":
            with torch.no_grad():
                return self.finish(self.multiply(self.operand(y)))
        return self.finish(self.multiply(self.operand(y)))

    def multiply(self, y: Tensor) -> Tensor:
        return self.linear(y)

    def finish(self, result: Tensor) -> Tensor:
        return result


class Inline(Linear):
    """A linear without a module."""

    def multiply(self, y: Tensor) -> Tensor:
        return F.linear(y, self.linear.weight, self.linear.bias)


class Right(Linear):
    """Multiplies with a parameter of [D, N]."""

    def __init__(self, spec: ReaderSpec, shape: tuple[int, ...]) -> None:
        super().__init__(replace(spec, bias=False), shape)
        self.linear.weight = nn.Parameter(self.linear.weight.detach().t().contiguous(), spec.trains)

    def multiply(self, y: Tensor) -> Tensor:
        return y @ self.linear.weight


class Einsum(Linear):
    def multiply(self, y: Tensor) -> Tensor:
        return torch.einsum("...d,nd->...n", y, self.linear.weight)


class Chunked(Linear):
    """Multiplies with one half of its weight."""

    def multiply(self, y: Tensor) -> Tensor:
        return F.linear(y, self.linear.weight.chunk(2)[1])


class Router(Linear):
    def finish(self, result: Tensor) -> Tensor:
        return torch.softmax(result, -1).topk(2).values


READERS: dict[str, type[Reader]] = {
    "output": Reader,
    "elementwise": Elementwise,
    "product": Product,
    "transposed": Transposed,
    "linear": Linear,
    "chunked": Chunked,
    "router": Router,
    "inline": Inline,
    "right": Right,
    "einsum": Einsum,
}


def _with_own_casts(linear: nn.Linear, spec: ReaderSpec) -> nn.Module:
    holder = nn.ModuleDict({"linear": linear})
    if spec.cast == "torchao inference":
        quantize_with_torchao(holder, spec.mode)
    elif spec.cast == "torchao training":
        convert_to_mxfp8_training(holder, spec.mode)
    elif spec.cast == "by hand":
        return CastLinear(linear, HAND_CASTS[spec.mode][0])
    return holder["linear"]


class RandomNorm(nn.Module):
    def __init__(self, spec: NormSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        width = width // 2 if spec.heads else width
        shape = (3, width) if spec.gain == "row" else (width,)
        gain = nn.Parameter((torch.rand(shape) + 0.5).to(spec.gain_dtype), spec.trains)
        spelling = SPELLINGS.get(spec.spelling)
        if spelling is None:
            self.inner: Norm = Norm(NEAR_MISSES[spec.spelling].function, gain, spec.eps)
        else:
            function = spelling.function or rms_norm
            self.inner = Norm(function, gain if spelling.has_gain else None, self.eps)
        if self.inner.weight is not None:
            self.inner.weight.requires_grad_(spec.trains)

    @property
    def eps(self) -> float:
        spelling = SPELLINGS.get(self.spec.spelling)
        return 0.0 if spelling is not None and not spelling.eps else self.spec.eps

    @property
    def reason(self) -> SkipReason | None:
        """Why no RMSNorm of this spelling fuses."""
        near_miss = NEAR_MISSES.get(self.spec.spelling)
        return near_miss.reason if near_miss is not None else None

    @property
    def gives_a_site(self) -> bool:
        return self.spec.spelling in SPELLINGS or self.reason is not None

    def rows(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)) if self.spec.heads else x

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        return inner.function(self.rows(x), self.weight(), inner.eps).reshape(x.shape)

    def weight(self) -> Tensor | None:
        weight = self.inner.weight
        if weight is None or self.spec.gain == "plain":
            return weight
        return weight[1] if self.spec.gain == "row" else weight * 0.5 + 0.25

    def gain(self) -> Tensor | None:
        weight = self.weight()
        return 1.0 + weight.float() if SPELLINGS[self.spec.spelling].one_plus else weight


class Stage(nn.Module):
    def __init__(self, norm: RandomNorm, spec: StageSpec, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.norm, self.spec = norm, spec
        self.readers = nn.ModuleList(READERS[r.kind](r, shape) for r in spec.readers)

    def forward(self, source: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        if self.spec.inline:
            y = self.norm.forward(source)
            seen = self.seen(y)
            return y, *(reader.forward(seen, other) for reader in self.readers)
        y = self.norm(source)
        seen = self.seen(y)
        return y, *(reader(seen, other) for reader in self.readers)

    def seen(self, y: Tensor) -> Tensor:
        """What all readers see of the norm's output."""
        return VIEWS[self.spec.view](y.to(self.spec.dtype or y.dtype))


class RandomModel(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        torch.manual_seed(0)
        stages: list[Stage] = []
        for stage in spec.stages:
            if stage.norm is None:
                norm = stages[-1].norm
            else:
                norm = RandomNorm(stage.norm, spec.shape[-1])
            stages.append(Stage(norm, stage, spec.shape))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor, branch: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.flow(x, branch, other, list(self.stages))

    def flow(
        self, x: Tensor, branch: Tensor, other: Tensor, stages: Sequence[Callable[..., Any]]
    ) -> tuple[Tensor, ...]:
        """The model with its stages evaluated by other functions."""
        hidden, source, y = x, x, x
        results: list[Tensor] = []
        for own, stage in zip(self.stages, stages, strict=True):
            source = SOURCES[own.spec.source](hidden, source, y, branch)
            if own.spec.checkpoint and stage is own:
                y, *outputs = checkpoint(stage, source, other, use_reentrant=False)
            else:
                y, *outputs = stage(source, other)
            results += outputs
            if own.spec.chain:
                fits = [t for t in outputs if t.numel() == hidden.numel()]
                hidden = hidden + fits[0].reshape(hidden.shape).to(hidden.dtype) if fits else hidden
        return tuple(results)


def arguments(spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden state, another to add to it, and one of other rows."""
    x = inputs(*spec.shape, dtype=spec.dtype, scale=0.1)
    branch = inputs(*spec.shape, dtype=spec.dtype, scale=0.1, seed=3)
    other = inputs(OTHER_ROWS, spec.shape[-1], scale=1.0, seed=4)
    return x.requires_grad_(spec.train and spec.input_trains), branch, other


# What it must compute


@dataclass(frozen=True)
class Reference:
    """The model in eager mode, with the report's fused sites in ``functional``.

    Attributes:
        sites: one per stage, None where the stage's norm gives none.
    """

    model: RandomModel
    spec: ModelSpec
    config: MXNormConfig
    sites: tuple[Site | None, ...]

    @classmethod
    def of(cls, model: RandomModel, spec: ModelSpec, report: Report) -> Reference:
        config = MXNormConfig(**spec.options)
        sites = iter(report.sites)
        by_stage = tuple(next(sites) if s.norm.gives_a_site else None for s in model.stages)
        return cls(model, spec, config, by_stage)

    def outputs(self, *args: Tensor) -> tuple[Tensor, ...]:
        stages = [_ReferenceStage(self, i) for i in range(len(self.sites))]
        with torch.autocast("cpu", BF16, enabled=self.spec.autocast):
            return self.model.flow(*args, stages)


@dataclass(frozen=True)
class _ReferenceStage:
    reference: Reference
    index: int

    @property
    def stage(self) -> Stage:
        return self.reference.model.stages[self.index]

    def __call__(self, source: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        exact = self.stage.norm(source)
        seen = self.stage.seen(exact)
        return exact, *(
            self._read(position, source, exact, seen, other)
            for position in range(len(self.stage.readers))
        )

    def _read(
        self, position: int, source: Tensor, exact: Tensor, seen: Tensor, other: Tensor
    ) -> Tensor:
        reader = self.stage.readers[position]
        site = self.reference.sites[self.index]
        name = linear_name(self.reference.spec, self.index, position)
        if reader.spec.kind in KEEP_THE_NORM:
            return reader(seen, other)
        with torch.set_grad_enabled(torch.is_grad_enabled() and reader.spec.gradient != "off"):
            # Inline linears share a name: those without casts bear it too.
            fusable = is_fusable(reader, name, self.stage.norm, self.reference.config)
            fused = site is not None and site.estimator == "mxnorm" and name in site.consumers
            if fused and fusable:
                return reader.finish(self._fused_linear(reader, name, source, exact, site))
            if is_cast_by_backend(reader, name, self.stage.norm, self.reference.config):
                return reader.finish(self._mx_linear(reader, name, reader.operand(seen)))
        return reader(seen, other)

    def _fused_linear(
        self, reader: Linear, name: str, source: Tensor, exact: Tensor, site: Site
    ) -> Tensor:
        norm, config = self.stage.norm, self.reference.config.resolve(site.norm).config
        x, gain, eps = norm.rows(source), norm.gain(), norm.eps
        norm_dtype = x.dtype if SPELLINGS[norm.spec.spelling].rounds else None
        rounding = {"norm_dtype": norm_dtype, "out_dtype": exact.dtype}
        fmt = self._kept_format(reader, name).without_log2
        options = {"eps": eps, "p": config.p}
        y = functional.mxnorm(
            x, gain, block_size=fmt.block_size, gradient=config.gradient, **options, **rounding
        )
        operand = reader.operand(self.stage.seen(y.reshape(exact.shape)))
        in_cast = gain if site.gain == "activation" else None
        scale = None if fmt.has_e8m0_scales else _largest_scale(x, in_cast, fmt, options)
        values, scales, _ = functional.mxnorm_cast(
            x, in_cast, format=fmt, tensor_scale=scale, **options
        )
        rows = operand.shape[:-1]
        # As the ops return it: a bias is added to a strided operand's product in another rounding.
        quantized = values.reshape(*rows, -1).contiguous(), scales.reshape(*rows, -1), scale
        fold = gain if site.gain == "fold" else None
        return self._mx_linear(reader, name, operand, quantized=quantized, gain=fold)

    def _mx_linear(self, reader: Linear, name: str, y: Tensor, **fused: Any) -> Tensor:
        linear = reader.linear
        kept = self._kept_format(reader, name)
        # A weight with the gain in it has a new cast.
        form = {"format": kept if fused.get("gain") is None else kept.without_log2}
        weight = linear.weight.t() if isinstance(reader, Right) else linear.weight
        if reader.spec.cast == "torchao inference":
            values, scales, _ = fused["quantized"]
            activation = functional.mx_dequantize(values, scales, BF16)
            return F.linear(activation, linear.weight.dequantize())
        if reader.spec.cast == "torchao training":
            recipe = Recipe(kept={"format": kept}, backward="mx")
            out = MXBackward.apply(y, linear.weight, recipe, form | fused)
            return out if linear.bias is None else out + linear.bias
        dtype = BF16 if self.reference.spec.autocast else y.dtype
        bias = linear.bias.to(dtype) if linear.bias is not None else None
        with torch.autocast("cpu", enabled=False):
            return functional.mx_linear(y.to(dtype), weight.to(dtype), bias, **form, **fused)

    def _kept_format(self, reader: Linear, name: str) -> BlockFormat:
        """Of the casts that the pass leaves as they are."""
        if reader.spec.cast == "by hand":
            return BlockFormat.of(scale_mode=HAND_CASTS[reader.spec.mode][1])
        if reader.spec.cast != "plain":
            return BlockFormat.of(scale_mode=torchao_mode(reader.spec.mode))
        return self.reference.config.resolve(name).config.cast_format


def _largest_scale(
    x: Tensor, gain: Tensor | None, fmt: BlockFormat, options: dict[str, Any]
) -> Tensor:
    """Of NVFP4 under tensor_scale="amax"."""
    y = functional.mxnorm(x, gain, block_size=fmt.block_size, out_dtype=torch.float32, **options)
    return functional.nvfp4_tensor_scale(y)


def linear_name(spec: ModelSpec, stage: int, reader: int) -> str:
    """The module by which the report knows a linear, or its weight."""
    linear = f"stages.{stage}.readers.{reader}.linear"
    is_module = spec.stages[stage].readers[reader].kind in ("linear", "router")
    return linear if is_module and not spec.stages[stage].inline else f"{linear}.weight"


def is_cast_by_backend(reader: Linear, name: str, norm: RandomNorm, config: MXNormConfig) -> bool:
    """Does ``quantize`` give this linear casts, whatever becomes of its norm?"""
    weight = reader.linear.weight
    if reader.spec.cast != "plain" or config.quantize == "existing":
        return False
    if config.quantize == "norm-fed" and norm.spec.spelling not in SPELLINGS:
        return False
    enabled = config.resolve(name, opt_in=isinstance(reader, Router)).enabled
    block_size = config.resolve(name).config.cast_format.block_size
    return enabled and all(size % block_size == 0 for size in weight.shape)


def is_fusable(reader: Reader, name: str, norm: RandomNorm, config: MXNormConfig) -> bool:
    """Does an MX cast of the norm's output feed this reader, which is not turned off?"""
    if reader.spec.kind in KEEP_THE_NORM:
        return False
    if reader.spec.cast == "plain":
        return is_cast_by_backend(reader, name, norm, config)
    return config.resolve(name).enabled
