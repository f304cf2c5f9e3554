"""Estimate how many bytes a graph moves to and from device memory.

Both estimates count tensors, whatever a compiler will make of them, and know no caches:

- unfused: every op reads each of its inputs once and writes its outputs once, as in eager mode.
  Views are free; of an expanded tensor only the memory behind it is read, and an op that picks
  rows (embedding, gather) reads as many bytes as it writes, besides the index.
- fused: pointwise ops, reductions and the ops of this package run in one kernel as long as no
  other op (a matmul, attention) stands between them, forward and backward apart. A kernel reads
  what comes from outside once, and writes what is read outside. No compiler promises that:
  Inductor needs two or three kernels for a norm and its cast.

A symbolic size counts with its hint, the size that the graph was traced with.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass.graph_utils import aten, is_backward
from mxnorm_pass.ops import NAMESPACE
from mxnorm_pass.subgraph import Traffic

_FREE = frozenset({aten._unsafe_view.default, aten.sym_size.int})
_PICKS_ROWS = frozenset(
    {
        aten.embedding.default,
        aten.gather.default,
        aten.index.Tensor,
        aten.index_select.default,
    }
)
# Reductions, and what writes or moves elements without the tag of pointwise ops.
_FUSIBLE = frozenset(
    "sum mean amax amin max min prod any all argmax argmin var var_mean linalg_vector_norm "
    "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp "
    "_to_copy to full full_like zeros zeros_like ones ones_like empty empty_like scalar_tensor "
    "arange iota cat constant_pad_nd repeat flip native_layer_norm".split()
)

Inputs = Callable[[fx.Node], Sequence[fx.Node]]


def all_inputs(node: fx.Node) -> Sequence[fx.Node]:
    return node.all_input_nodes


class TrafficEstimate:
    """Estimates for nodes of one graph, which may change in between: sizes are kept by node."""

    def __init__(self) -> None:
        self._sizes: dict[fx.Node, int | None] = {}

    def of_graph(self, graph: fx.Graph) -> Traffic:
        """The whole graph; its outputs are written."""
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        returned = {self._stored(n, all_inputs) for n in graph.output_node().all_input_nodes}
        return self.of(nodes, returned)

    def of(
        self,
        nodes: Sequence[fx.Node],
        read_outside: Collection[fx.Node],
        inputs: Inputs = all_inputs,
    ) -> Traffic:
        """Some nodes in graph order.

        Args:
            read_outside: those whose values others read, too.
            inputs: the nodes that a node reads.
        """
        unfused = _sum(self.of_op(node, inputs) for node in nodes)
        return Traffic(
            unfused, None if unfused is None else self._fused(nodes, read_outside, inputs)
        )

    def of_op(self, node: fx.Node, inputs: Inputs = all_inputs) -> int | None:
        """Bytes that the op moves as a kernel of its own; 0 for views; None where unknown."""
        if node.op != "call_function" or is_free(node.target):
            return 0
        written = self._size(node)
        read = (self._read(node, source, inputs) for source in inputs(node))
        return _sum((written, *read))

    def _fused(
        self, nodes: Sequence[fx.Node], read_outside: Collection[fx.Node], inputs: Inputs
    ) -> int | None:
        # A kernel is the fusible nodes between the same number of library calls, or one such call.
        depth: dict[fx.Node, int] = {}
        kernel: dict[fx.Node, object] = {}
        moved: dict[object, int | None] = {}
        for node in nodes:
            sources = [s for s in inputs(node) if s.op != "output"]
            below = max((depth.get(source, 0) for source in sources), default=0)
            if is_free(node.target):
                depth[node], kernel[node] = below, kernel.get(sources[0]) if sources else None
                continue
            depth[node] = below if _is_fusible(node.target) else below + 1
            is_own = depth[node] != below
            kernel[node] = node if is_own else (below, is_backward(node))
            for source in sources:
                stored = self._stored(source, inputs)
                if kernel.get(stored) != kernel[node]:
                    moved.setdefault((stored, kernel[node]), self._read(node, source, inputs))
                    if stored in kernel:
                        moved.setdefault(stored, self._size(stored))
        for node in read_outside:
            stored = self._stored(node, inputs)
            if stored in kernel:
                moved.setdefault(stored, self._size(stored))
        return _sum(moved.values())

    def _read(self, node: fx.Node, source: fx.Node, inputs: Inputs) -> int | None:
        sizes = [self._size(source), self._size(self._stored(source, inputs))]
        if node.target in _PICKS_ROWS and source is node.args[0]:
            sizes.append(self._size(node))
        known = [size for size in sizes if size is not None]
        return min(known) if len(known) == len(sizes) else None

    def _stored(self, node: fx.Node, inputs: Inputs) -> fx.Node:
        """The node whose memory ``node`` is a view of."""
        while is_view_of_memory(node):
            sources = inputs(node)
            if not sources:
                break
            node = sources[0]
        return node

    def _size(self, node: fx.Node) -> int | None:
        if node not in self._sizes:
            self._sizes[node] = _bytes(node.meta.get("val"))
        return self._sizes[node]


def is_view_of_memory(node: fx.Node) -> bool:
    return (
        node.op == "call_function" and node.target is not operator.getitem and is_free(node.target)
    )


@cache
def is_free(target: Any) -> bool:
    """Does a call of ``target`` move no bytes: a view, a size, one of several results?"""
    if not isinstance(target, torch._ops.OpOverload):
        # Python functions compute sizes; higher-order ops stand for kernels.
        return not isinstance(target, torch._ops.HigherOrderOperator)
    aliases = [r.alias_info for r in target._schema.returns]
    return target in _FREE or any(a is not None and not a.is_write for a in aliases)


@cache
def _is_fusible(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.partition("::")[2]
    is_own = target.namespace == NAMESPACE
    return torch.Tag.pointwise in target.tags or is_own or name in _FUSIBLE


def _bytes(value: Any) -> int | None:
    if isinstance(value, (tuple, list)):
        return _sum(map(_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    sizes = [size if isinstance(size, int) else _hint(size) for size in value.shape]
    if None in sizes:
        return None
    return math.prod(sizes) * value.dtype.itemsize


def _hint(size: Any) -> int | None:
    """The size with which the graph was traced; asking for it adds no guard."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return hint if isinstance(hint, int) else None


def _sum(terms: Iterable[int | None]) -> int | None:
    total = 0
    for term in terms:
        if term is None:
            return None
        total += term
    return total
