"""Choose what runs in the place of each op of this package in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph_utils import SubgraphCache


def decompose(graph: fx.Graph, decompositions: Mapping[Any, Any]) -> int:
    """Replace every op of this package in ``graph`` by its ATen ops; returns how many."""
    subgraphs = SubgraphCache(decompositions)
    replaced = 0
    for op, function in ops.DECOMPOSITIONS.items():
        for node in graph.find_nodes(op="call_function", target=op):
            replace_node(graph, node, subgraphs.graft(graph, node, function, node.args))
            replaced += 1
    return replaced


def replace_node(graph: fx.Graph, node: fx.Node, outputs: fx.Node | tuple[fx.Node, ...]) -> None:
    """Let the readers of an op read ``outputs``, one node per result of the op."""
    if isinstance(outputs, tuple):
        for getitem in list(node.users):
            getitem.replace_all_uses_with(outputs[getitem.args[1]])  # type: ignore[index]
            graph.erase_node(getitem)
    else:
        node.replace_all_uses_with(outputs)
    graph.erase_node(node)
