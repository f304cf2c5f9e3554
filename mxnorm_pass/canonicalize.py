"""Merge equal nodes, remove dead ones.

The joint graph is not CSE'd: q, k and v each carry their own dequantisation of the same cast.
Matching sees through that; after a rewrite the copies are merged, which nothing later does for an
inference graph::

    values, scales -> dequantize -> mm (q)          values, scales -> dequantize -> mm (q)
                   -> dequantize -> mm (k)    =>                                 -> mm (k)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


def merge_equal(nodes: Iterable[fx.Node]) -> None:
    """Let equal calls among ``nodes`` (in graph order) be one; the others are left dead."""
    first: dict[Any, fx.Node] = {}
    for node in nodes:
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)


def remove_dead(graph: fx.Graph) -> None:
    """Erase calls without users and side effects.

    ``Graph.eliminate_dead_code`` asks every node for side effects, which on a graph of some ten
    thousand nodes takes longer than the rest of the pass.
    """
    impure: dict[Any, bool] = {}
    for node in reversed(graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr"):
            if not isinstance(node.target, torch._ops.OpOverload):
                is_impure = node.is_impure()
            elif (known := impure.get(node.target)) is not None:
                is_impure = known
            else:
                is_impure = impure[node.target] = node.is_impure()
            if not is_impure:
                graph.erase_node(node)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ("sequence", *map(_hashable, value))
    if isinstance(value, dict):
        return ("mapping", *((k, _hashable(v)) for k, v in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    # 1, 1.0 and True are equal but not the same argument.
    return (type(value).__name__, value)
