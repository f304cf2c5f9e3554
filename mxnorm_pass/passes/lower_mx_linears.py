"""Open linears on MX operands into what multiplies: a native matmul, a kernel, or a matmul of
what is widened first.

Chips from sm_100 on multiply values and scales by themselves, with the call that torchao's
inference linears make there (``lower_scaled_mm``). On Hopper a kernel multiplies few rows by the
weight as it is, and those of one x together (``few_rows``); where the number of rows is symbolic,
each call chooses. Elsewhere both are dequantised, the activation once for all that read it,
which the norm's kernel does as it writes it::

    x values, scales -> mx_linear -> y        x values, scales -> dequantize -> mm -> y
                     -> mx_linear -> z   =>                                  -> mm -> z
                                              weight values, scales -> dequantize -> mm
"""

from __future__ import annotations

import logging
from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call
from mxnorm_pass.graph.nodes import is_view, same_shape, strip
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.ops.mx_linear import MXLinearCall, multiply
from mxnorm_pass.passes.few_rows import FewRows, few_rows, write_few_rows
from mxnorm_pass.passes.lower_scaled_mm import ScaledMM, scaled_mm
from mxnorm_pass.passes.match.linears.widened import keeps_rows
from mxnorm_pass.passes.rewrite.shapes import rows_like

log = logging.getLogger(__name__)


def lower_mx_linears(graph: fx.Graph, tracer: FunctionTracer) -> int:
    """Replace every ``mx_linear``; returns how many native matmuls there are then."""
    widening = _Widening(graph, tracer)
    native, few = 0, []
    for node in graph.find_nodes(op="call_function", target=ops.mx_linear):
        linear = MXLinearCall.of(node.args)
        decision = scaled_mm(linear)
        if isinstance(decision, ScaledMM):
            with graph.inserting_before(node):
                y = decision.write(graph, node, tracer)
            native += 1
        else:
            kernel = few_rows(node, linear)
            if isinstance(kernel, FewRows):
                few.append(kernel)
                continue
            log.debug("%s is widened: %s; %s", node.name, decision, kernel)
            y = widening.write(node, linear)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        # By which an exported program knows its outputs.
        y.name = node.name
        for operand in (linear.x, linear.x_scales):
            _erase_dead_views(graph, operand)
    write_few_rows(graph, few)
    return native


def _erase_dead_views(graph: fx.Graph, node: fx.Node) -> None:
    """Those that linears alone have read would be readers of values and scales."""
    while is_view(node) and not node.users:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        graph.erase_node(node)
        node = source


class _Widening:
    """Linears by their reference, what several read being widened once, before the first."""

    def __init__(self, graph: fx.Graph, tracer: FunctionTracer) -> None:
        self._graph = graph
        self._tracer = tracer
        self._widened: dict[tuple[Any, ...], fx.Node] = {}

    def write(self, before: fx.Node, linear: MXLinearCall) -> fx.Node:
        """The node of the result."""
        of, dtype = linear, linear.dtype
        x = (*_as_written(of), of.x_format.name, dtype, of.x_tensor_scale)
        weight = (of.weight, of.weight_scales, of.weight_format.name, dtype, of.weight_tensor_scale)
        wide = self._dequantized(before, x)
        with self._graph.inserting_before(before):
            rows = rows_like(self._graph, before, wide, before)
        operands = (rows, self._dequantized(before, weight), of.bias)
        y: fx.Node = self._tracer.graft(self._graph, before, multiply, operands)
        return y

    def _dequantized(self, before: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        args = args if args[-1] is not None else args[:-1]
        if args not in self._widened:
            with self._graph.inserting_before(before):
                self._widened[args] = call(self._graph, before, ops.dequantize, *args)
        return self._widened[args]


def _as_written(linear: MXLinearCall) -> tuple[fx.Node, fx.Node]:
    """Values and scales of x before they were viewed: a kernel then finds who reads its results."""
    values, scales = (strip(n, keeps_rows) for n in (linear.x, linear.x_scales))
    if same_shape(*(n.meta["val"].shape[:-1] for n in (values, scales))):
        return values, scales
    return linear.x, linear.x_scales
