"""Decide for every norm of a graph whether it is fused, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.code import call_text
from mxnorm_pass.graph.nodes import is_backward, same_size, tensor_of
from mxnorm_pass.match.cast import Cast, UnknownCast, find_casts
from mxnorm_pass.match.dequantize import dequantization
from mxnorm_pass.match.feeds import feeds_linear_or_cast
from mxnorm_pass.match.layer_norm import LayerNorm, find_layer_norms
from mxnorm_pass.match.linear import (
    CastIndex,
    Consumer,
    Reader,
    cast_use,
    casts_by_matmul,
    is_opt_in,
    narrowest_dtype,
    plain_linear,
    readers,
    weight_cast,
    weight_text,
)
from mxnorm_pass.match.norm import Norm
from mxnorm_pass.match.norm_tail import rounding_skip
from mxnorm_pass.match.residual import residual_add
from mxnorm_pass.match.skip import Skip
from mxnorm_pass.match.transposed_cast import Read, TransposedCast, transposed_casts
from mxnorm_pass.match.uncast import no_cast
from mxnorm_pass.numerics.formats import MX_BLOCK_SIZE, MXFormat
from mxnorm_pass.numerics.layout import ScaleLayout
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.rms import Estimator
from mxnorm_pass.options.config import Calibrated, MXNormConfig
from mxnorm_pass.report.reason import SkipReason
from mxnorm_pass.report.site import Site


@dataclass(frozen=True)
class FusedCast:
    """A cast of the norm's output: its format, and the dtype to which the output is rounded."""

    format: MXFormat
    out_dtype: torch.dtype
    scale_layout: ScaleLayout


@dataclass(frozen=True)
class Fusion:
    """A norm to rewrite, with all that the rewrite needs to know.

    Attributes:
        norm: the RMSNorm.
        consumers: the linears that will read the fused cast.
        config: the options that hold for this norm.
        gain: "fold" or "activation"; None for a norm without a gain.
        residual: the residual add whose sum the norm reads, if the fused op does it.
        transposed: the backward's casts along T that one of ``casts`` can make, too.
        calibration: what the calibration does to this norm.
        block_weights: [K] float32, of the calibration.
    """

    norm: Norm
    consumers: tuple[Consumer, ...]
    config: MXNormConfig
    gain: str | None
    residual: fx.Node | None = None
    transposed: tuple[TransposedCast, ...] = ()
    calibration: Calibrated | None = None
    block_weights: Tensor | None = field(default=None, compare=False)

    @property
    def estimator(self) -> Estimator:
        return self.config.estimator

    @property
    def gradient(self) -> Gradient:
        return self.config.gradient

    @property
    def casts(self) -> tuple[FusedCast, ...]:
        """The different casts that the consumers read, in order."""
        return tuple(dict.fromkeys(map(self.cast_of, self.consumers)))

    def cast_of(self, consumer: Consumer) -> FusedCast:
        output = tensor_of(self.norm.output)
        assert output is not None
        layout: ScaleLayout = "blocked" if consumer.linear.blocked_scales else "row-major"
        fmt = self._format_of(consumer.cast)
        return FusedCast(fmt, consumer.rounds_to or output.dtype, layout)

    def _format_of(self, cast: Cast) -> MXFormat:
        if self.estimator == "mxnorm":
            # Its values differ from the matched graph's anyhow: no log2 has to be emulated.
            return cast.format.without_log2
        return cast.format

    def transposed_with(self, cast: FusedCast) -> tuple[Cast, ...]:
        """The backward's casts along T that the op of ``cast`` makes."""
        return tuple(t.cast for t in self.transposed if self.cast_beside(t) == cast)

    def cast_beside(self, transposed: TransposedCast) -> FusedCast | None:
        """The first of the casts that is of the same format and the same rounding."""
        wanted = (self._format_of(transposed.cast), transposed.rounds_to)
        return next((c for c in self.casts if (c.format, c.out_dtype) == wanted), None)

    def refused(self, skip: Skip) -> Refusal:
        names = tuple(dict.fromkeys(c.name for c in self.consumers))
        return Refusal(self.norm.name, self.norm.anchor, skip, names)

    def site(self) -> Site:
        return Site(
            norm=self.norm.name,
            consumers=tuple(dict.fromkeys(c.name for c in self.consumers)),
            status="fused",
            estimator=self.estimator,
            gain=self.gain,
            format=str(self.casts[0].format),
            residual=self.residual is not None,
            calibration=self.calibration,
        )


@dataclass(frozen=True)
class Refusal:
    """A norm that stays as it is."""

    name: str
    anchor: fx.Node
    skip: Skip
    consumers: tuple[str, ...] = ()

    def site(self) -> Site:
        return Site(
            norm=self.name,
            consumers=self.consumers,
            reason=self.skip.reason,
            detail=self.skip.detail,
            near_miss=self.skip.near_miss(self.anchor),
        )


@dataclass(frozen=True)
class Obstacle:
    """Why no norm of a graph may be rewritten.

    Attributes:
        reason: what each norm is refused with.
        detail, expected: what was found, and what had to be, in words.
    """

    reason: SkipReason
    detail: str
    expected: str


@dataclass(frozen=True)
class _Context:
    casts: CastIndex
    by_matmul: dict[fx.Node, tuple[Cast, ...]]
    unknown: dict[fx.Node, UnknownCast]
    config: MXNormConfig
    subclass: str | None
    differentiated: bool
    obstacle: Obstacle | None


def find_sites(
    graph: fx.Graph,
    norms: Sequence[Norm],
    config: MXNormConfig,
    *,
    tensor_subclass: str | None = None,
    differentiated: bool = False,
    obstacle: Obstacle | None = None,
) -> list[Fusion | Refusal]:
    """One fusion or refusal per norm, LayerNorms included, in graph order. Changes nothing.

    Args:
        tensor_subclass: name of a tensor subclass on whose inner tensors the graph works.
        differentiated: derivatives of the graph exist already, so that a norm cannot become an
            estimate any more.
        obstacle: what keeps all norms as they are.
    """
    casts = find_casts(graph)
    known = [c for c in casts if isinstance(c, Cast)]
    context = _Context(
        casts=CastIndex.of(known),
        by_matmul=casts_by_matmul(known),
        unknown={c.source: c for c in casts if isinstance(c, UnknownCast)},
        config=config,
        subclass=tensor_subclass,
        differentiated=differentiated,
        obstacle=obstacle,
    )
    sites = [_find_site(norm, context) for norm in norms if _counts(norm, context)]
    sites += [_refuse_layer_norm(norm, config) for norm in find_layer_norms(graph)]
    return list(_with_residual_adds(sorted(sites, key=_anchor)))


def _counts(norm: Norm, context: _Context) -> bool:
    """Is it an RMSNorm, or does what reads it make it stand for one?"""
    return norm.is_rms_norm or feeds_linear_or_cast(norm.output, context.casts, context.unknown)


def _with_residual_adds(sites: Iterable[Fusion | Refusal]) -> Iterator[Fusion | Refusal]:
    """Give each fusion the add in front of it; of several norms of one sum the first gets it."""
    taken: set[fx.Node] = set()
    for site in sites:
        if isinstance(site, Fusion):
            gain = site.norm.gain
            add = residual_add(site.norm, [gain] if gain is not None else [], taken)
            if add is not None:
                taken.add(add)
                site = replace(site, residual=add)
        yield site


def _anchor(site: Fusion | Refusal) -> fx.Node:
    return site.norm.anchor if isinstance(site, Fusion) else site.anchor


def _refuse_layer_norm(norm: LayerNorm, config: MXNormConfig) -> Refusal:
    enabled = config.resolve(norm.name).enabled
    detail = f"{norm.anchor.target}, which subtracts the mean"
    skip = Skip(SkipReason.LAYER_NORM, detail, norm.anchor, "the mean of x^2")
    return Refusal(norm.name, norm.anchor, skip if enabled else _turned_off(norm.name))


def _turned_off(name: str) -> Skip:
    return Skip(SkipReason.DISABLED, f"modules turns {name!r} off")


def _find_site(norm: Norm, context: _Context) -> Fusion | Refusal:
    resolved = context.config.resolve(norm.name)
    read_by = readers(norm.output, context.casts)
    found = _consumers(norm, read_by, context)
    enabled = tuple(c for c in found.consumers if _is_enabled(c, context.config))
    skip = _legality(norm, context, found, enabled, resolved.enabled)
    names = tuple(dict.fromkeys(c.name for c in found.consumers))
    if skip is not None:
        return _refuse(norm, skip, names)
    gain = _gain_mode(norm, enabled, resolved.config)
    if isinstance(gain, Skip):
        return _refuse(norm, gain, names)
    fusion = Fusion(
        norm=norm,
        consumers=enabled,
        config=resolved.config,
        gain=gain,
        calibration=resolved.calibration,
        block_weights=resolved.block_weights,
    )
    paths = chain.from_iterable(reader.path for reader in read_by)
    reads = _backward_reads(dict.fromkeys((norm.output, *paths)))
    return _with_transposed_casts(fusion, reads)


def _backward_reads(nodes: Iterable[fx.Node]) -> list[Read]:
    return [(node, user) for node in nodes for user in node.users if is_backward(user)]


def _is_enabled(consumer: Consumer, config: MXNormConfig) -> bool:
    opt_in = is_opt_in(consumer.linear.matmul)
    return config.resolve(consumer.name, opt_in).enabled


def _refuse(norm: Norm, skip: Skip, consumers: tuple[str, ...]) -> Refusal:
    return Refusal(norm.name, norm.anchor, skip, consumers)


@dataclass
class _Consumers:
    consumers: list[Consumer] = field(default_factory=list)
    escapes: list[Skip] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)


def _consumers(norm: Norm, read_by: Sequence[Reader], context: _Context) -> _Consumers:
    found = _Consumers()
    for reader in read_by:
        if reader.cast is None:
            linear = plain_linear(reader.node)
            if linear is not None:
                found.plain.append(linear.name)
            continue
        use = cast_use(reader.cast)
        if use.escape is not None:
            found.escapes.append(_escape(reader.cast, use.escape))
        for matmul in use.matmuls:
            weight = weight_cast(matmul, reader.cast, context.by_matmul)
            rounds_to = narrowest_dtype((norm.output, *reader.path))
            product = dequantization(reader.cast, matmul)
            consumer = Consumer(matmul, reader, reader.cast, weight, rounds_to, product)
            found.consumers.append(consumer)
    found.consumers.sort(key=lambda c: c.linear.matmul)
    return found


def _escape(cast: Cast, reader: fx.Node) -> Skip:
    expected = "dequantisation and matmul as the only readers of values and scales"
    if reader.op == "output":
        detail = f"{cast.values.name} or what is made of it is an output of the graph"
        return Skip(SkipReason.CAST_ESCAPES, detail, cast.values, expected)
    detail = f"{reader.name} ({call_text(reader)})"
    return Skip(SkipReason.CAST_ESCAPES, detail, reader, expected)


def _legality(
    norm: Norm,
    context: _Context,
    found: _Consumers,
    enabled: tuple[Consumer, ...],
    norm_enabled: bool,
) -> Skip | None:
    """The first reason against a rewrite, the most general one first."""
    if context.subclass is not None:
        return Skip(SkipReason.DTENSOR, context.subclass, norm.anchor, "plain tensors")
    if not norm_enabled:
        return _turned_off(norm.name)
    if norm.problem is not None:
        return norm.problem
    if context.obstacle is not None:
        obstacle = context.obstacle
        return Skip(obstacle.reason, obstacle.detail, norm.anchor, obstacle.expected)
    if found.escapes:
        return found.escapes[0]
    if not found.consumers:
        off = [name for name in found.plain if context.config.turns_off(name)]
        if off:
            return Skip(SkipReason.DISABLED, f"consumers off: {', '.join(off)}")
        return _no_cast(norm, context)
    if not enabled:
        names = ", ".join(dict.fromkeys(c.name for c in found.consumers))
        return Skip(SkipReason.DISABLED, f"every consumer is off: {names}")
    for consumer in enabled:
        block_size = consumer.cast.format.block_size
        if norm.width % block_size:
            return _odd_width(norm, block_size)
    exact = context.config.resolve(norm.name).config.estimator == "exact"
    if context.differentiated and not exact and not norm.estimated:
        detail = "the norm has been differentiated as it is"
        return Skip(SkipReason.BACKWARD, detail, norm.anchor, "a norm that is an estimate already")
    if exact:
        roundings = (norm.rounding, *map(_several_roundings, enabled))
        return next((r for r in roundings if isinstance(r, Skip)), None)
    return None


def _odd_width(norm: Norm, block_size: int) -> Skip:
    detail = f"width {norm.width}, block size {block_size}"
    return Skip(SkipReason.WIDTH, detail, norm.output, f"a width in whole blocks of {block_size}")


def _several_roundings(consumer: Consumer) -> Skip | None:
    """The refusal where the norm's output passes through several narrow dtypes to a cast."""
    if consumer.rounds_to is not None:
        return None
    return rounding_skip(consumer.reader.path[-1], "a single rounding of the norm's output")


def _no_cast(norm: Norm, context: _Context) -> Skip:
    read_by = readers(norm.output, CastIndex.of(()))
    for node in (norm.output, *chain.from_iterable((*r.path, r.node) for r in read_by)):
        if node in context.unknown:
            unknown = context.unknown[node]
            reason = SkipReason.CAST_NOT_RECOGNIZED
            return Skip(reason, unknown.detail, unknown.node, unknown.expected)
    if norm.width % MX_BLOCK_SIZE:
        return _odd_width(norm, MX_BLOCK_SIZE)
    return no_cast(norm.output, read_by, context.config)


def _gain_mode(
    norm: Norm, consumers: tuple[Consumer, ...], config: MXNormConfig
) -> str | Skip | None:
    if norm.gain is None:
        return None
    # The exact estimator promises to change no bit, and folding rounds differently.
    if config.gain == "activation" or config.estimator == "exact":
        return "activation"
    missing = [c for c in consumers if not _can_fold(c, norm)]
    if not missing:
        return "fold"
    if config.gain == "fold":
        texts = "; ".join(map(_multiplied, missing))
        expected = f"a cast of each linear's [N, {norm.width}] weight, for the forward alone"
        return Skip(SkipReason.NO_WEIGHT_CAST, texts, missing[0].linear.matmul, expected)
    return "activation"


def _multiplied(consumer: Consumer) -> str:
    if _backward_reads(consumer.quantized):
        return f"the backward of {consumer.name} multiplies what its forward has cast"
    return f"{consumer.name} multiplies {weight_text(consumer)}"


def _can_fold(consumer: Consumer, norm: Norm) -> bool:
    """Is the weight cast in the graph, with the norm's channels along its last dimension?

    And for the forward alone: a backward that multiplies what was cast, as that of a fake
    quantisation does, wants the gain in the activation and not in the weight.
    """
    if consumer.weight is None or _backward_reads(consumer.quantized):
        return False
    weight = tensor_of(consumer.weight.weight)
    return weight is not None and same_size(weight.shape[-1], norm.width)


def _with_transposed_casts(fusion: Fusion, reads: Sequence[Read]) -> Fusion:
    if not fusion.norm.rounding:
        # The op would cast along T what was rounded in another way.
        return fusion
    found = transposed_casts(fusion.norm, reads)
    return replace(fusion, transposed=tuple(t for t in found if fusion.cast_beside(t)))
