"""Decide for every norm of a graph whether it is fused, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.code import call_text
from mxnorm_pass.graph.nodes import is_backward, same_size, tensor_of
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.casts.find import Cast, UnknownCast, find_casts
from mxnorm_pass.passes.match.fusion import Decision, Fusion, Refusal, scales_by_rows
from mxnorm_pass.passes.match.linears.consumer import (
    Consumer,
    WeightCast,
    casts_by_matmul,
    weight_cast,
    weight_text,
)
from mxnorm_pass.passes.match.linears.dequantize import dequantization
from mxnorm_pass.passes.match.linears.feeds import feeds_linear_or_cast
from mxnorm_pass.passes.match.linears.no_cast import no_cast
from mxnorm_pass.passes.match.linears.plain import is_opt_in, plain_linear
from mxnorm_pass.passes.match.linears.products import cast_use
from mxnorm_pass.passes.match.linears.readers import CastIndex, Reader, narrowest_dtype, readers
from mxnorm_pass.passes.match.linears.tensor_scale import not_only_scaled_by, readers_beside
from mxnorm_pass.passes.match.norms.find import Norm
from mxnorm_pass.passes.match.norms.layer_norm import LayerNorm, find_layer_norms
from mxnorm_pass.passes.match.norms.tail import rounding_skip
from mxnorm_pass.passes.match.residual_add import residual_add
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.passes.match.transposed_cast import Read, transposed_casts
from mxnorm_pass.report.reason import SkipReason


@dataclass(frozen=True)
class _Context:
    casts: CastIndex
    by_matmul: dict[fx.Node, tuple[Cast, ...]]
    unknown: dict[fx.Node, Skip]
    config: MXNormConfig
    subclass: str | None
    differentiated: bool
    obstacle: Skip | None


def decide(
    graph: fx.Graph,
    norms: Sequence[Norm],
    config: MXNormConfig,
    *,
    tensor_subclass: str | None = None,
    differentiated: bool = False,
    obstacle: Skip | None = None,
) -> list[Decision]:
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
        unknown={c.source: c.skip for c in casts if isinstance(c, UnknownCast)},
        config=config,
        subclass=tensor_subclass,
        differentiated=differentiated,
        obstacle=obstacle,
    )
    decisions = [_decide(norm, context) for norm in norms if _counts(norm, context)]
    decisions += [_refuse_layer_norm(norm, config) for norm in find_layer_norms(graph)]
    return list(_with_residual_adds(sorted(decisions, key=_anchor)))


def _counts(norm: Norm, context: _Context) -> bool:
    """Is it an RMSNorm, or does what reads it make it stand for one?"""
    return norm.is_rms_norm or feeds_linear_or_cast(norm.output, context.casts, context.unknown)


def _with_residual_adds(decisions: Iterable[Decision]) -> Iterator[Decision]:
    """Give each fusion the add in front of it; of several norms of one sum the first gets it."""
    taken: set[fx.Node] = set()
    for decision in decisions:
        if isinstance(decision, Fusion):
            add = residual_add(decision.norm, decision.op_inputs, taken)
            if add is not None:
                taken.add(add)
                decision = replace(decision, residual=add)
        yield decision


def _anchor(decision: Decision) -> fx.Node:
    return decision.norm.anchor if isinstance(decision, Fusion) else decision.anchor


def _refuse_layer_norm(norm: LayerNorm, config: MXNormConfig) -> Refusal:
    enabled = config.resolve(norm.name).enabled
    detail = f"{norm.anchor.target}, which subtracts the mean"
    skip = Skip(SkipReason.LAYER_NORM, detail, norm.anchor, "the mean of x^2")
    return Refusal(norm.name, norm.anchor, skip if enabled else _turned_off(norm.name))


def _turned_off(name: str) -> Skip:
    return Skip(SkipReason.DISABLED, f"modules turns {name!r} off")


def _decide(norm: Norm, context: _Context) -> Decision:
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
    escape = _tensor_scale_escape(fusion)
    if escape is not None:
        return fusion.refused(escape)
    paths = chain.from_iterable(reader.path for reader in read_by)
    reads = _backward_reads(dict.fromkeys((norm.output, *paths)))
    return _with_transposed_casts(fusion, reads)


def _tensor_scale_escape(fusion: Fusion) -> Skip | None:
    """The refusal where something reads a tensor's scale that another would have to replace."""
    rescaled = (c.cast for cast in fusion.casts if cast.rescales for c in cast.consumers)
    for cast in dict.fromkeys(rescaled):
        linears = [c.linear for c in fusion.consumers if c.cast == cast]
        node = not_only_scaled_by(cast, linears)
        if node is not None:
            detail = f"{node.name} ({call_text(node)}), with the scale {cast.tensor_scale}"
            expected = "each linear's result multiplied once by the tensor's scale, and no more"
            return Skip(SkipReason.CAST_ESCAPES, detail, node, expected)
    return None


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
            matmul = matmul.with_scales_of(reader.cast, norm.width)
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
        return replace(context.obstacle, node=norm.anchor)
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
    if not exact and (several := _several_block_sizes(enabled)) is not None:
        return several
    if context.differentiated and not exact and not norm.estimated:
        detail = "the norm has been differentiated as it is"
        return Skip(SkipReason.BACKWARD, detail, norm.anchor, "a norm that is an estimate already")
    if exact:
        roundings = (norm.rounding, *map(_several_roundings, enabled))
        return next((r for r in roundings if isinstance(r, Skip)), None)
    return None


def _several_block_sizes(consumers: Sequence[Consumer]) -> Skip | None:
    first = consumers[0].cast.format.block_size
    for consumer in consumers:
        size = consumer.cast.format.block_size
        if size != first:
            detail = f"{consumer.name} casts blocks of {size}, {consumers[0].name} of {first}"
            expected = f"blocks of {first}, as for {consumers[0].name}"
            return Skip(SkipReason.BLOCK_SIZES, detail, consumer.linear.matmul, expected)
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
            return context.unknown[node]
    block_size = context.config.resolve(norm.name).config.cast_format.block_size
    if norm.width % block_size:
        return _odd_width(norm, block_size)
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
        texts = "; ".join(_multiplied(c, norm) for c in missing)
        expected = f"a cast of each linear's [N, {norm.width}] weight, for the forward alone"
        return Skip(SkipReason.NO_WEIGHT_CAST, texts, missing[0].linear.matmul, expected)
    return "activation"


def _multiplied(consumer: Consumer, norm: Norm) -> str:
    if _backward_reads(consumer.quantized):
        return f"the backward of {consumer.name} multiplies what its forward has cast"
    if _wants_gain(consumer.cast, norm):
        scale = consumer.cast.tensor_scale
        return f"{consumer.name} multiplies what {scale} scales, which was chosen with the gain"
    if consumer.weight is not None and not _takes_gain(consumer.weight):
        return f"the scales of the weight of {consumer.name} are those of its size without the gain"
    return f"{consumer.name} multiplies {weight_text(consumer)}"


def _can_fold(consumer: Consumer, norm: Norm) -> bool:
    """Is the weight cast in the graph, with the norm's channels along its last dimension?

    And for the forward alone: a backward that multiplies what was cast, as that of a fake
    quantisation does, wants the gain in the activation and not in the weight.
    """
    if consumer.weight is None or _backward_reads(consumer.quantized):
        return False
    if _wants_gain(consumer.cast, norm) or not _takes_gain(consumer.weight):
        return False
    weight = tensor_of(consumer.weight.weight)
    return weight is not None and same_size(weight.shape[-1], norm.width)


def _wants_gain(cast: Cast, norm: Norm) -> bool:
    """Was the tensor's scale chosen for rows with their gain, and stays as it is?"""
    return cast.tensor_scale is not None and not scales_by_rows(norm, cast)


def _takes_gain(weight: WeightCast) -> bool:
    """Can its cast hold the weight times a gain of whatever size?

    Scales in e4m3 need another tensor's scale then, of which what scales a matmul's result would
    have to be told.
    """
    if weight.cast.tensor_scale is None:
        return weight.cast.format.has_e8m0_scales
    beside = readers_beside(weight.cast)
    known = all(reader.target is ops.dequantize for reader in beside)
    return known and any(reader in weight.slice for reader in beside)


def _with_transposed_casts(fusion: Fusion, reads: Sequence[Read]) -> Fusion:
    if not fusion.norm.rounding:
        # The op would cast along T what was rounded in another way.
        return fusion
    return fusion.with_transposed(transposed_casts(fusion.norm, reads))
