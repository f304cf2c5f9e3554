"""Turn a matched norm into MXNorm. Never declines: what is legal was decided in ``match``.

For each norm and MX format::

    x -> norm -> cast -> values, scales          x -> norm_cast -> values, scales, rho
           |                             =>      x -> norm
           +-> high-precision readers                   |
                                                        +-> high-precision readers

What nobody reads any more is dead. A norm that was made an estimate before the graph was
differentiated reads rho of the fused op, as does its derivative. The residual add in front of a
norm goes into the op, too, see ``residual``. Of consumers that dequantise, those that want one
dtype share one ``dequantize`` of values and scales.

A backward that casts the transposed norm output for the weight gradient gets this cast from the
same op::

    x -> norm -> cast                            x -> norm_cast_both -> values, scales, rho,
           |                                 =>                         values_t, scales_t
           +-> transpose -> cast (backward)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import stable_topological_sort

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call, constant, outputs_of
from mxnorm_pass.graph.cleanup import merge_equal
from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import (
    aten,
    dtype_of,
    is_view,
    partition_of,
    prims,
    same_shape,
    same_size,
    tensor_of,
)
from mxnorm_pass.graph.trace import SubgraphCache
from mxnorm_pass.numerics.norm import Gradient, inverse_rms, inverse_rms_vjp
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.fusion import FusedCast, Fusion
from mxnorm_pass.passes.match.linears.consumer import Consumer, WeightCast
from mxnorm_pass.passes.match.linears.products import cast_use
from mxnorm_pass.passes.match.norms.find import Norm
from mxnorm_pass.passes.match.norms.tail import Rounding
from mxnorm_pass.residual import fuse_residual_add


def rewrite(graph: fx.Graph, fusion: Fusion, subgraphs: SubgraphCache) -> None:
    """Edit one fusion into the graph; dead nodes are left for the caller to remove."""
    fusion = replace(fusion, norm=_with_flat_gain(graph, fusion.norm))
    at = fusion.norm.anchor if fusion.norm.estimated else fusion.norm.output.next
    weights = _block_weights(graph, fusion, at)
    rhos = [_fuse_casts(graph, fusion, cast, weights, at) for cast in fusion.casts]
    merge_equal(sorted({node for c in fusion.consumers for node in c.linear.slice}))
    if fusion.gain == "fold":
        _fold_gain(graph, fusion)
    if fusion.norm.estimated:
        _share_rho(graph, fusion, rhos[0], weights, subgraphs)
    if fusion.residual is not None:
        op, _ = rhos[0].args
        fuse_residual_add(graph, op, fusion.residual)  # type: ignore[arg-type]


def _with_flat_gain(graph: fx.Graph, norm: Norm) -> Norm:
    """The norm with its gain as [D], where it may be [1, D] or [1, 1, D]."""
    gain = norm.gain
    if gain is None or len(gain.meta["val"].shape) == 1:
        return norm
    # Graph inputs stay in front of all else.
    inputs = graph.find_nodes(op="placeholder")
    after = inputs[-1] if gain in inputs else gain
    with graph.inserting_after(after):
        flat = call(graph, gain, aten.reshape.default, gain, [norm.width])
    return replace(norm, gain=flat)


def _share_rho(
    graph: fx.Graph,
    fusion: Fusion,
    rho: fx.Node,
    block_weights: fx.Node | None,
    subgraphs: SubgraphCache,
) -> None:
    """Let all that reads the estimate, the backward above all, read the fused op's."""
    for derivative in _derivatives(fusion.norm.anchor):
        _expand_derivative(graph, derivative, block_weights, subgraphs)
    fusion.norm.anchor.replace_all_uses_with(rho)
    late = [n for n in rho.args[0].all_input_nodes if n > rho]  # type: ignore[union-attr]
    if late:
        # Such as a gain of 1 + w, which the model computes after the statistic.
        stable_topological_sort(graph)


def _derivatives(estimate: fx.Node) -> list[fx.Node]:
    """The nodes that differentiate an ``inverse_rms`` node."""
    found, pending = [], [estimate]
    while pending:
        for user in pending.pop().users:
            if user.target is ops.inverse_rms_backward:
                found.append(user)
            elif is_view(user):
                pending.append(user)
    return found


def expand_estimates(graph: fx.Graph, subgraphs: SubgraphCache) -> None:
    """Write out what is left of ``inverse_rms`` and its derivative."""
    for node in graph.find_nodes(op="call_function", target=ops.inverse_rms_backward):
        _expand_derivative(graph, node, _weights_of(graph, node), subgraphs)
    for node in graph.find_nodes(op="call_function", target=ops.inverse_rms):
        x, _, *options = node.args
        new = subgraphs.graft(graph, node, _inverse_rms, (x, _weights_of(graph, node), *options))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _weights_of(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    weights = node.args[names.index("block_weights")]
    if weights is None:
        return None
    with real_tensors():
        values = torch.tensor(weights, dtype=torch.float32)
    with graph.inserting_before(node):
        return constant(graph, node, values)


def _inverse_rms(
    x: Tensor, weights: Tensor | None, eps: float, p: float, block_size: int, gradient: Gradient
) -> Tensor:
    return inverse_rms(x, eps=eps, p=p, block_size=block_size, block_weights=weights)


def _expand_derivative(
    graph: fx.Graph, node: fx.Node, block_weights: fx.Node | None, subgraphs: SubgraphCache
) -> None:
    grad, x, rho, _, *options = node.args
    args = (grad, x, rho, block_weights, *options)
    node.replace_all_uses_with(subgraphs.graft(graph, node, _inverse_rms_vjp, args))
    graph.erase_node(node)


def _inverse_rms_vjp(
    grad: Tensor,
    x: Tensor,
    rho: Tensor,
    weights: Tensor | None,
    eps: float,
    p: float,
    block_size: int,
    gradient: Gradient,
) -> Tensor:
    return inverse_rms_vjp(
        x,
        rho,
        grad,
        eps=eps,
        p=p,
        block_size=block_size,
        block_weights=weights,
        gradient=gradient,
    )


def _block_weights(graph: fx.Graph, fusion: Fusion, at: fx.Node) -> fx.Node | None:
    """The calibration's weights as a constant of the graph, before all that may read it."""
    if fusion.block_weights is None:
        return None
    with graph.inserting_before(at):
        return constant(graph, fusion.norm.output, fusion.block_weights)


def _fuse_casts(
    graph: fx.Graph,
    fusion: Fusion,
    cast: FusedCast,
    block_weights: fx.Node | None,
    at: fx.Node,
) -> fx.Node:
    """Insert the fused op before ``at``, hand its results to the consumers; returns rho."""
    norm = fusion.norm
    rounding = norm.rounding or Rounding(None, dtype_of(norm.output))
    consumers = [c for c in fusion.consumers if fusion.cast_of(c) == cast]
    transposed = fusion.transposed_with(cast)
    fmt = cast.format
    origin = norm.output
    options = (
        block_weights,
        norm.eps,
        fusion.estimator,
        fusion.config.p,
        fmt.block_size,
        fmt.elem_dtype,
        fmt.scale_mode,
        rounding.norm_dtype,
        cast.out_dtype,
        cast.scale_layout,
    )
    in_rows = fusion.gain == "activation"
    with graph.inserting_before(at):
        if transposed:
            op = call(graph, origin, ops.norm_cast_both, norm.x, norm.gain, *options, in_rows)
        else:
            gain = norm.gain if in_rows else None
            op = call(graph, origin, ops.norm_cast, norm.x, gain, *options)
        values, scales, rho, *along_rows = outputs_of(graph, origin, op)
        _redirect_casts(graph, origin, consumers, values, scales)
    for backward_cast in transposed:
        _redirect_transposed(graph, backward_cast, *along_rows)
    return rho


def _redirect_transposed(graph: fx.Graph, cast: Cast, values: fx.Node, scales: fx.Node) -> None:
    """Let the backward read the cast along T that the forward has made."""
    replaced = {}
    for old, new in ((cast.values, values), (cast.scales, scales)):
        with graph.inserting_before(old):
            replaced[old] = _byte_view(graph, old, new, old)
    _replace_cast(cast, replaced)


def _redirect_casts(
    graph: fx.Graph, at: fx.Node, consumers: Sequence[Consumer], values: fx.Node, scales: fx.Node
) -> None:
    matmuls = {c.linear.matmul for c in consumers}
    products = {(c.cast, c.linear.matmul): c.dequantized for c in consumers}
    views: dict[object, fx.Node] = {}
    for cast in dict.fromkeys(c.cast for c in consumers):
        use = cast_use(cast)
        new_values = _shared_view(graph, at, values, cast.values, views)
        exclusive = all(m.matmul in matmuls for m in use.matmuls)
        for matmul in use.matmuls:
            if matmul.matmul not in matmuls:
                continue
            old_scales = matmul.blocked_scales or cast.scales
            new_scales = _shared_view(graph, at, scales, old_scales, views)
            replaced = {cast.values: new_values, old_scales: new_scales}
            product = products[cast, matmul.matmul]
            if product is not None:
                new = _shared_dequantization(graph, values, scales, product, views)
                replaced[product] = _shared_view(graph, product, new, product, views)
            if exclusive:
                _replace_cast(cast, replaced)
            else:
                _clone_dequantization(graph, matmul.slice, matmul.matmul, replaced)


def _replace_cast(cast: Cast, replaced: Mapping[fx.Node, fx.Node]) -> None:
    for old, new in replaced.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in cast.nodes)


def _shared_view(
    graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node, views: dict[object, fx.Node]
) -> fx.Node:
    """:func:`_byte_view`, made once for all who ask for the same one."""
    target = tensor_of(like)
    assert target is not None
    key = (node, str(tuple(target.shape)), target.dtype)
    if key not in views:
        views[key] = _byte_view(graph, at, node, like)
    return views[key]


def _shared_dequantization(
    graph: fx.Graph,
    values: fx.Node,
    scales: fx.Node,
    like: fx.Node,
    made: dict[object, fx.Node],
) -> fx.Node:
    """Values times scales in the dtype of ``like``, made once for each part of the graph."""
    key = (values, dtype_of(like), *partition_of(like))
    if key not in made:
        made[key] = call(graph, like, ops.dequantize, values, scales, dtype_of(like))
    return made[key]


def _byte_view(graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """``node`` in the shape and dtype of ``like``: scales may be read as E8M0 or as bytes."""
    view = reshape_like(graph, at, node, like)
    if dtype_of(view) == dtype_of(like):
        return view
    return call(graph, at, aten.view.dtype, view, dtype_of(like))


def _clone_dequantization(
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


def _fold_gain(graph: fx.Graph, fusion: Fusion) -> None:
    """weight -> cast becomes (weight * gain) -> cast, the product in float32."""
    gain = fusion.norm.gain
    assert gain is not None
    for consumer in fusion.consumers:
        weight = consumer.weight
        assert weight is not None
        at = weight.cast.values
        comes_late = gain > at
        with graph.inserting_before(at):
            values, scales = _cast_scaled_weight(graph, at, weight, gain)
            new_values = _byte_view(graph, at, values, weight.cast.values)
            new_scales = _byte_view(graph, at, scales, weight.cast.scales)
        replaced = {weight.cast.values: new_values, weight.cast.scales: new_scales}
        _redirect_weight(graph, weight.cast, consumer.linear.matmul, replaced)
        if comes_late:
            # The weight was cast before the gain was known: all that reads the cast moves down.
            stable_topological_sort(graph)


def _redirect_weight(
    graph: fx.Graph, cast: Cast, matmul: fx.Node, replaced: Mapping[fx.Node, fx.Node]
) -> None:
    """Let one matmul read another cast of its weight; others may share the old one."""
    use = cast_use(cast)
    if all(m.matmul is matmul for m in use.matmuls):
        _replace_cast(cast, replaced)
        return
    for other in use.matmuls:
        if other.matmul is matmul:
            _clone_dequantization(graph, other.slice, matmul, replaced)


def _cast_scaled_weight(
    graph: fx.Graph, at: fx.Node, weight: WeightCast, gain: fx.Node
) -> tuple[fx.Node, ...]:
    # As in the activation's cast: the product with the gain has no bits in the matched graph.
    fmt = weight.cast.format.without_log2
    weight32 = _to_dtype(graph, at, weight.weight, torch.float32)
    scaled = call(graph, at, aten.mul.Tensor, weight32, _to_dtype(graph, at, gain, torch.float32))
    cast = call(graph, at, ops.cast, scaled, fmt.block_size, fmt.elem_dtype, fmt.scale_mode)
    return outputs_of(graph, at, cast)


def reshape_like(graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """View ``node`` in the shape of ``like``, which has as many elements."""
    own, target = tensor_of(node), tensor_of(like)
    assert own is not None and target is not None
    if same_shape(own.shape, target.shape):
        return node
    sizes: list[object] = list(target.shape)
    symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbolic) == 1:
        sizes[symbolic[0]] = -1
    else:
        for i in symbolic:
            sizes[i] = _size_of(graph, at, node, like, i)
    return call(graph, at, aten.reshape.default, node, sizes)


def _size_of(graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node, dim: int) -> fx.Node:
    """Size ``dim`` of ``like``, read off ``node`` if it has it: ``like`` may stand further down."""
    own, target = tensor_of(node), tensor_of(like)
    assert own is not None and target is not None
    for i, size in enumerate(own.shape):
        if same_size(size, target.shape[dim]):
            return call(graph, at, aten.sym_size.int, node, i)
    return call(graph, at, aten.sym_size.int, like, dim)


def _to_dtype(graph: fx.Graph, at: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if dtype_of(node) == dtype:
        return node
    return call(graph, at, prims.convert_element_type.default, node, dtype)
