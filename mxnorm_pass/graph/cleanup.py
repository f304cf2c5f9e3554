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
    """Let equal calls among ``nodes`` (in graph order) be one; the others are left dead.

    Calls that draw random numbers stay as many as they are.
    """
    first: dict[Any, fx.Node] = {}
    for node in nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
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
        removable = not node.users and node.op in ("call_function", "get_attr")
        if removable and not _is_impure(node, impure):
            graph.erase_node(node)


def _is_impure(node: fx.Node, known: dict[Any, bool]) -> bool:
    """Whether it has side effects, which for an op its schema says: ``known``, by op."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.is_impure()
    if node.target not in known:
        known[node.target] = node.is_impure()
    return known[node.target]


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ("sequence", *map(_hashable, value))
    if isinstance(value, dict):
        return ("mapping", *((k, _hashable(v)) for k, v in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    # 1, 1.0 and True are equal but not the same argument.
    return (type(value).__name__, value)
