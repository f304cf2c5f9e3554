"""Write linears on dequantised operands as one op each, which reads values and scales.

Before::

    x values, scales -----> dequantize -> view -----> mm
    weight values, scales -> dequantize -> permute -> mm

After, in the place of the matmul::

    x values, scales -> views, weight values, scales, bias -> mx_linear

So the weight stays in its 8 or 4 bits up to the kernel that multiplies, and no compiler can fold
its widened copy. The op is what the graph was, bit for bit.

Only for graphs that nothing differentiates: a backward reads what the matmul reads, and wants it
in high precision, or casts it along T by a recipe of its own. There many rows hide what the
weight's dequantisation costs, and the partitioner may recompute what the matmul reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call, created_nodes
from mxnorm_pass.graph.nodes import aten, dtype_of, has_backward, is_transpose
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.linears.mx_linear import MXLinear, find_mx_linears
from mxnorm_pass.passes.match.linears.plain import linear_name
from mxnorm_pass.passes.match.linears.widened import Widened
from mxnorm_pass.passes.rewrite.shapes import rows_like

Views = dict[tuple[fx.Node, str], fx.Node]


@dataclass(frozen=True)
class WrittenLinear:
    """A linear that has become an op.

    Attributes:
        node: that was the matmul.
        created: the views that it reads, and no linear before it.
    """

    node: fx.Node
    created: tuple[fx.Node, ...]


def write_mx_linears(graph: fx.Graph, config: MXNormConfig) -> list[WrittenLinear]:
    """Replace the linears of a graph for inference; what they alone read is left dead."""
    if has_backward(graph.nodes):
        return []
    return list(_write_all(graph, config))


def _write_all(graph: fx.Graph, config: MXNormConfig) -> Iterator[WrittenLinear]:
    views: Views = {}
    for found in find_mx_linears(graph):
        if not config.turns_off(linear_name(found.matmul)):
            with created_nodes(graph) as created:
                _write(graph, found, views)
            yield WrittenLinear(found.matmul, tuple(created))


def _write(graph: fx.Graph, found: MXLinear, views: Views) -> None:
    node, x, weight = found.matmul, found.x, found.weight
    with graph.inserting_before(node):
        rows = [_in_rows_of(graph, node, operand, views) for operand in _operand(graph, node, x)]
        args = (*rows, *_operand(graph, node, weight), found.bias)
    scales = [x.tensor_scale, weight.tensor_scale]
    while scales and scales[-1] is None:
        scales.pop()
    node.target = ops.mx_linear
    node.args = (*args, x.format.name, weight.format.name, weight.dtype, *scales)


def _in_rows_of(graph: fx.Graph, matmul: fx.Node, operand: fx.Node, views: Views) -> fx.Node:
    """What a matmul of matrices reads as one, made once for all that do."""
    key = (operand, str(matmul.meta["val"].shape[:-1]))
    if key not in views:
        views[key] = rows_like(graph, matmul, operand, matmul)
    return views[key]


def _operand(graph: fx.Graph, like: fx.Node, operand: Widened) -> tuple[fx.Node, fx.Node]:
    values, scales = (_turned_once(n) for n in (operand.values, operand.scales))
    if dtype_of(scales) is torch.uint8:
        scales = call(graph, like, aten.view.dtype, scales, operand.format.scale_dtype)
    return values, scales


def _turned_once(node: fx.Node) -> fx.Node:
    """Without pairs of transpositions, as libraries store weights."""
    while is_transpose(node) and is_transpose(node.args[0]):  # type: ignore[arg-type]
        node = node.args[0].args[0]  # type: ignore[union-attr, assignment]
    return node
