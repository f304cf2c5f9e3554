"""Open linears on MX operands into what multiplies: a native matmul, or a widened activation.

Chips from sm_100 on multiply values and scales by themselves, with the call that torchao's
inference linears make there (``lower_scaled_mm``). Elsewhere the activation is dequantised once
for all linears that read it, which the norm's kernel does as it writes it, and the weight is
multiplied as it is::

    x values, scales -> mx_linear -> y        x values, scales -> dequantize -> mx_weight_linear
                     -> mx_linear -> z   =>                                  -> mx_weight_linear

``lower`` then puts a kernel in the place of ``mx_weight_linear`` where one covers it: on chips
below sm_100, for few rows. Where none does, or rows are many, the weight is dequantised into the
graph and multiplied there; where the number of rows is symbolic, the op stays and chooses at each
call.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call
from mxnorm_pass.graph.nodes import is_view, same_shape, strip
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.ops.mx_linear import MXLinearCall
from mxnorm_pass.passes.lower_scaled_mm import ScaledMM, scaled_mm
from mxnorm_pass.passes.match.linears.widened import keeps_rows
from mxnorm_pass.passes.rewrite.shapes import rows_like

log = logging.getLogger(__name__)


def lower_mx_linears(graph: fx.Graph, tracer: FunctionTracer) -> int:
    """Replace every ``mx_linear``; returns how many native matmuls there are then."""
    widened: dict[tuple[Any, ...], fx.Node] = {}
    native = 0
    for node in graph.find_nodes(op="call_function", target=ops.mx_linear):
        linear = MXLinearCall.of(node.args)
        with graph.inserting_before(node):
            decision = scaled_mm(linear)
            if isinstance(decision, ScaledMM):
                y = decision.write(graph, node, tracer)
                native += 1
            else:
                log.debug("%s is widened: %s", node.name, decision)
                y = _on_widened(graph, node, linear, widened)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        for operand in (linear.x, linear.x_scales):
            _erase_dead_views(graph, operand)
    return native


def _erase_dead_views(graph: fx.Graph, node: fx.Node) -> None:
    """Those that linears alone have read would be readers of values and scales."""
    while is_view(node) and not node.users:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        graph.erase_node(node)
        node = source


def _on_widened(
    graph: fx.Graph,
    node: fx.Node,
    linear: MXLinearCall,
    widened: dict[tuple[Any, ...], fx.Node],
) -> fx.Node:
    """At the insertion point; what several linears read is widened once, before the first."""
    values, scales = _as_written(linear)
    of_x = () if linear.x_tensor_scale is None else (linear.x_tensor_scale,)
    key = (values, scales, linear.x_format.name, linear.dtype, *of_x)
    if key not in widened:
        widened[key] = call(graph, node, ops.dequantize, *key)
    x = rows_like(graph, node, widened[key], node)
    own = (linear.weight, linear.weight_scales, linear.bias, linear.weight_format.name)
    of_weight = () if linear.weight_tensor_scale is None else (linear.weight_tensor_scale,)
    return call(graph, node, ops.mx_weight_linear, x, *own, *of_weight)


def _as_written(linear: MXLinearCall) -> tuple[fx.Node, fx.Node]:
    """Values and scales of x before they were viewed: a kernel then finds who reads its results."""
    values, scales = (strip(n, keeps_rows) for n in (linear.x, linear.x_scales))
    if same_shape(*(n.meta["val"].shape[:-1] for n in (values, scales))):
        return values, scales
    return linear.x, linear.x_scales
