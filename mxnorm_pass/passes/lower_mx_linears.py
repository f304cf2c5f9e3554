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
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.ops.mx_linear import MXLinearCall
from mxnorm_pass.passes.lower_scaled_mm import ScaledMM, scaled_mm

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
    return native


def _on_widened(
    graph: fx.Graph,
    node: fx.Node,
    linear: MXLinearCall,
    widened: dict[tuple[Any, ...], fx.Node],
) -> fx.Node:
    """At the insertion point; what several linears read is widened once, before the first."""
    operand = (linear.x, linear.x_scales, linear.x_format.name, linear.dtype)
    of_x = () if linear.x_tensor_scale is None else (linear.x_tensor_scale,)
    key = (*operand, *of_x)
    if key not in widened:
        widened[key] = call(graph, node, ops.dequantize, *key)
    own = (linear.weight, linear.weight_scales, linear.bias, linear.weight_format.name)
    of_weight = () if linear.weight_tensor_scale is None else (linear.weight_tensor_scale,)
    return call(graph, node, ops.mx_weight_linear, widened[key], *own, *of_weight)
