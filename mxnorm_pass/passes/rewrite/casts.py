"""Put the fused op in the place of a norm's casts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call, outputs_of
from mxnorm_pass.graph.nodes import dtype_of, partition_of, tensor_of
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.fusion import FusedCast, Fusion
from mxnorm_pass.passes.match.linears.consumer import Consumer
from mxnorm_pass.passes.match.linears.products import cast_use
from mxnorm_pass.passes.rewrite.shapes import byte_view
from mxnorm_pass.passes.rewrite.tensor_scale import tensor_scale_of


@dataclass(frozen=True)
class _Results:
    """Of a fused op, along D."""

    values: fx.Node
    scales: fx.Node
    tensor_scale: fx.Node | None
    format: BlockFormat


def fuse_casts(
    graph: fx.Graph,
    fusion: Fusion,
    cast: FusedCast,
    block_weights: fx.Node | None,
    at: fx.Node,
    tracer: FunctionTracer,
) -> fx.Node:
    """Insert the fused op before ``at``, hand its results to the consumers; returns rho."""
    norm, spec, consumers = fusion.norm, cast.spec, cast.consumers
    transposed = fusion.transposed_with(cast)
    origin = norm.output
    in_rows = fusion.gain == "activation"
    gain = norm.gain if in_rows or transposed else None
    tensor_scale = tensor_scale_of(graph, fusion, cast, gain, block_weights, at, tracer)
    options = (block_weights, tensor_scale, *spec.arguments())
    with graph.inserting_before(at):
        if transposed:
            alike = fusion.casts_alike(cast, transposed[0])
            options = (*options, in_rows, *(() if alike else transposed[0].arguments()))
            op = call(graph, origin, ops.norm_cast_both, norm.x, gain, *options)
        else:
            op = call(graph, origin, ops.norm_cast, norm.x, gain, *options)
        values, scales, rho, *along_rows = outputs_of(graph, origin, op)
        _redirect_casts(
            graph, origin, consumers, _Results(values, scales, tensor_scale, spec.format)
        )
    if tensor_scale is not None and tensor_scale > op:
        stable_topological_sort(graph)
    for consumer in consumers:
        _redirect_tensor_scale(consumer.cast, tensor_scale)
    for backward_cast in transposed:
        _redirect_transposed(graph, backward_cast.cast, *along_rows)
    return rho


def _redirect_tensor_scale(cast: Cast, new: fx.Node | None) -> None:
    """Let what scales the matmuls' results read the scale with which there was cast."""
    old = cast.tensor_scale
    if old is not None and new is not None and new is not old:
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in cast.nodes)


def _redirect_transposed(graph: fx.Graph, cast: Cast, values: fx.Node, scales: fx.Node) -> None:
    """Let the backward read the cast along T that the forward has made."""
    replaced = {}
    for old, new in ((cast.values, values), (cast.scales, scales)):
        with graph.inserting_before(old):
            replaced[old] = byte_view(graph, old, new, old)
    replace_cast(cast, replaced)


def _redirect_casts(
    graph: fx.Graph, at: fx.Node, consumers: Sequence[Consumer], new: _Results
) -> None:
    matmuls = {c.linear.matmul for c in consumers}
    views: dict[object, fx.Node] = {}
    for cast in dict.fromkeys(c.cast for c in consumers):
        new_values = _shared_view(graph, at, new.values, cast.values, views)
        exclusive = all(m.matmul in matmuls for m in cast_use(cast).matmuls)
        for consumer in consumers:
            if consumer.cast != cast:
                continue
            linear, product = consumer.linear, consumer.dequantized
            old_scales = linear.blocked_scales or cast.scales
            new_scales = _shared_view(graph, at, new.scales, old_scales, views)
            replaced = {cast.values: new_values, old_scales: new_scales}
            if product is not None:
                dequantized = _shared_dequantization(graph, new, product, views)
                replaced[product] = _shared_view(graph, product, dequantized, product, views)
            if exclusive:
                replace_cast(cast, replaced)
            else:
                clone_dequantization(graph, linear.slice, linear.matmul, replaced)


def replace_cast(cast: Cast, replaced: Mapping[fx.Node, fx.Node]) -> None:
    for old, new in replaced.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in cast.nodes)


def _shared_view(
    graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node, views: dict[object, fx.Node]
) -> fx.Node:
    """:func:`byte_view`, made once for all who ask for the same one."""
    target = tensor_of(like)
    assert target is not None
    key = (node, str(tuple(target.shape)), target.dtype)
    if key not in views:
        views[key] = byte_view(graph, at, node, like)
    return views[key]


def _shared_dequantization(
    graph: fx.Graph, new: _Results, like: fx.Node, made: dict[object, fx.Node]
) -> fx.Node:
    """Values times scales in the dtype of ``like``, made once for each part of the graph."""
    key = (new.values, dtype_of(like), *partition_of(like))
    if key not in made:
        args = (new.values, new.scales, new.format.name, dtype_of(like))
        tensor_scale = () if new.tensor_scale is None else (new.tensor_scale,)
        made[key] = call(graph, like, ops.dequantize, *args, *tensor_scale)
    return made[key]


def clone_dequantization(
    graph: fx.Graph,
    nodes: Iterable[fx.Node],
    matmul: fx.Node,
    replaced: Mapping[fx.Node, fx.Node],
) -> None:
    """Give one matmul a copy of a dequantisation that it shared with others."""
    env = dict(replaced)
    with graph.inserting_before(matmul):
        for node in nodes:
            if node not in replaced:
                env[node] = graph.node_copy(node, lambda n: env.get(n, n))
    for old, new in env.items():
        matmul.replace_input_with(old, new)
