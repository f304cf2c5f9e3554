"""Fold a norm's gain into the weights that its linears cast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call
from mxnorm_pass.graph.nodes import aten
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.fusion import Fusion
from mxnorm_pass.passes.match.linears.consumer import WeightCast
from mxnorm_pass.passes.match.linears.products import cast_use
from mxnorm_pass.passes.match.norms.find import Norm
from mxnorm_pass.passes.rewrite.casts import clone_dequantization, replace_cast
from mxnorm_pass.passes.rewrite.shapes import byte_view, to_dtype
from mxnorm_pass.passes.rewrite.write_cast import write_cast


def with_flat_gain(graph: fx.Graph, norm: Norm) -> Norm:
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


def fold_gain(graph: fx.Graph, fusion: Fusion) -> None:
    """weight -> cast becomes (weight * gain) -> cast, the product in float32."""
    gain = fusion.norm.gain
    assert gain is not None
    for consumer in fusion.consumers:
        weight = consumer.weight
        assert weight is not None
        at = weight.cast.values
        comes_late = gain > at
        with graph.inserting_before(at):
            replaced = _cast_scaled_weight(graph, at, weight, gain)
        _redirect_weight(graph, weight.cast, consumer.linear.matmul, replaced)
        if comes_late:
            # The weight was cast before the gain was known: all that reads the cast moves down.
            stable_topological_sort(graph)


def _redirect_weight(
    graph: fx.Graph, cast: Cast, matmul: fx.Node, replaced: Mapping[fx.Node, fx.Node]
) -> None:
    """Let one matmul read another cast of its weight; others may share the old one."""
    use = cast_use(cast)
    # A tensor's scale may be read beside the cast.
    if cast.tensor_scale is None and all(m.matmul is matmul for m in use.matmuls):
        replace_cast(cast, replaced)
        return
    for other in use.matmuls:
        if other.matmul is matmul:
            clone_dequantization(graph, other.slice, matmul, replaced)


def _cast_scaled_weight(
    graph: fx.Graph, at: fx.Node, weight: WeightCast, gain: fx.Node
) -> dict[fx.Node, fx.Node]:
    """What to read in the place of values, scales and the tensor's scale."""
    old = weight.cast
    # As in the activation's cast: the product with the gain has no bits in the matched graph.
    fmt = old.format.without_log2
    weight32 = to_dtype(graph, at, weight.weight, torch.float32)
    scaled = call(graph, at, aten.mul.Tensor, weight32, to_dtype(graph, at, gain, torch.float32))
    replaced = {}
    if old.tensor_scale is not None:
        replaced[old.tensor_scale] = call(graph, at, ops.tensor_scale, scaled)
    tensor_scale = next(iter(replaced.values()), None)
    values, scales = write_cast(graph, at, scaled, fmt, tensor_scale, old.square_blocks)
    replaced[old.values] = byte_view(graph, at, values, old.values)
    replaced[old.scales] = byte_view(graph, at, scales, old.scales)
    return replaced
