"""Write linears on dequantised operands as one op each, which reads values and scales.

Before::

    x values, scales -----> dequantize -> view -----> mm -> view -> y
    weight values, scales -> dequantize -> permute -> mm

After::

    x values, scales, weight values, scales, bias -> mx_linear -> y

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
from mxnorm_pass.graph.nodes import aten, dtype_of, is_backward, is_transpose, is_view, same_shape
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.linears.mx_linear import MXLinear, find_mx_linears
from mxnorm_pass.passes.match.linears.plain import linear_name
from mxnorm_pass.passes.match.linears.widened import Widened
from mxnorm_pass.passes.rewrite.shapes import reshape_like


@dataclass(frozen=True)
class WrittenLinear:
    """A linear that has become an op.

    Attributes:
        matmul: the node that it was, erased since.
        nodes: what stands in its place.
    """

    matmul: fx.Node
    nodes: tuple[fx.Node, ...]


def write_mx_linears(graph: fx.Graph, config: MXNormConfig) -> list[WrittenLinear]:
    """Replace the linears of a graph for inference; what they alone read is left dead."""
    if any(map(is_backward, graph.nodes)):
        return []
    return list(_write_all(graph, config))


def _write_all(graph: fx.Graph, config: MXNormConfig) -> Iterator[WrittenLinear]:
    for found in find_mx_linears(graph):
        if not config.turns_off(linear_name(found.matmul)):
            with created_nodes(graph) as created:
                _write(graph, found)
            yield WrittenLinear(found.matmul, tuple(created))


def _write(graph: fx.Graph, found: MXLinear) -> None:
    matmul, x, weight = found.matmul, found.x, found.weight
    with graph.inserting_before(matmul):
        args = (*_operand(graph, matmul, x), *_operand(graph, matmul, weight), found.bias)
        formats = (x.format.name, weight.format.name, weight.dtype)
        scales = [x.tensor_scale, weight.tensor_scale]
        while scales and scales[-1] is None:
            scales.pop()
        y = call(graph, matmul, ops.mx_linear, *args, *formats, *scales)
        view = next(iter(matmul.users)) if len(matmul.users) == 1 else None
        if view is not None and is_view(view) and same_shape(_shape(view), _shape(y)):
            _replace(graph, view, y)
            graph.erase_node(matmul)
        else:
            _replace(graph, matmul, reshape_like(graph, matmul, y, matmul))


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """The new node takes the name, too, by which an exported program knows its outputs."""
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    new.name = old.name


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
