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

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass.graph_utils import aten, is_backward
from mxnorm_pass.ops import NAMESPACE
from mxnorm_pass.subgraph import Traffic

_PICKS_ROWS = frozenset(
    {aten.embedding.default, aten.gather.default, aten.index.Tensor, aten.index_select.default}
)
# Reductions, and what writes or moves elements without the tag of pointwise ops.
_FUSIBLE = frozenset(
    "sum mean amax amin max min prod any all argmax argmin var var_mean linalg_vector_norm "
    "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp "
    "_to_copy to full full_like zeros zeros_like ones ones_like empty empty_like scalar_tensor "
    "arange iota cat constant_pad_nd repeat flip native_layer_norm".split()
)


class _Kind(Enum):
    VIEW = auto()
    RESULT = auto()  # one of several results
    NUMBER = auto()  # a size and what is computed from sizes
    FUSIBLE = auto()
    CALL = auto()


class TrafficEstimate:
    """What each node of a graph moves, as the graph stands when this is made.

    Args:
        sizes: those known from an earlier estimate; the values of nodes do not change.
    """

    def __init__(self, graph: fx.Graph, sizes: dict[fx.Node, int | None] | None = None) -> None:
        self.sizes = {} if sizes is None else sizes
        self._stored: dict[fx.Node, fx.Node] = {}
        # Of views: the bytes of memory behind them.
        self._extents: dict[fx.Node, int | None] = {}
        # Per op that moves something: the memory that it reads, and how much of it.
        self._reads: dict[fx.Node, list[tuple[fx.Node, int | None]]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                self._add(node)
        returned = {self._stored.get(n, n) for n in graph.output_node().all_input_nodes}
        self.total = self.of(list(self._stored), returned)

    def of(self, nodes: Sequence[fx.Node], read_outside: Collection[fx.Node]) -> Traffic:
        """Some nodes in graph order; ``read_outside`` are those whose values others read, too."""
        unfused = _sum(map(self.of_op, nodes))
        fused = _sum(self._crossings(nodes, read_outside)) if unfused is not None else None
        return Traffic(unfused, fused)

    def of_op(self, node: fx.Node) -> int | None:
        """Bytes that the op moves as a kernel of its own; 0 for views; None where unknown."""
        reads = self._reads.get(node)
        if reads is None:
            return 0
        return _sum((self._size(node), *(size for _, size in reads)))

    def _add(self, node: fx.Node) -> None:
        kind = _kind(node.target)
        inputs = node.all_input_nodes
        if kind is _Kind.VIEW and inputs:
            self._stored[node] = self._stored.get(inputs[0], inputs[0])
            self._extents[node] = _smaller(self._size(node), self._extent(inputs[0]))
            return
        self._stored[node] = node
        if kind in (_Kind.FUSIBLE, _Kind.CALL):
            self._reads[node] = [(self._stored.get(s, s), self._read(node, s)) for s in inputs]

    def _read(self, node: fx.Node, source: fx.Node) -> int | None:
        size = self._extent(source)
        # Others may have no positional arguments.
        if node.target in _PICKS_ROWS and source is node.args[0]:
            size = _smaller(size, self._size(node))
        return size

    def _crossings(
        self, nodes: Sequence[fx.Node], read_outside: Collection[fx.Node]
    ) -> Iterator[int | None]:
        """Bytes of each read of a kernel from outside of it, and of each value that it writes.

        A kernel is the fusible nodes after the same number of library calls, or one such call.
        """
        depth: dict[fx.Node, int] = {}
        kernels: dict[fx.Node, object] = {}
        read: set[tuple[fx.Node, object]] = set()
        written = {self._stored.get(node, node) for node in read_outside}
        for node in nodes:
            reads = self._reads.get(node)
            if reads is None:
                source = node.all_input_nodes[0] if node.all_input_nodes else node
                depth[node] = depth.get(self._stored.get(source, source), 0)
                kernels[node] = kernels.get(self._stored.get(source, source))
                continue
            calls = max((depth.get(stored, 0) for stored, _ in reads), default=0)
            fusible = _kind(node.target) is _Kind.FUSIBLE
            depth[node] = calls if fusible else calls + 1
            kernel: object = (calls, is_backward(node)) if fusible else node
            kernels[node] = kernel
            for stored, size in reads:
                if kernels.get(stored) != kernel and (stored, kernel) not in read:
                    read.add((stored, kernel))
                    written.add(stored)
                    yield size
        yield from (self._size(node) for node in written if kernels.get(node) is not None)

    def _extent(self, node: fx.Node) -> int | None:
        return self._extents[node] if node in self._extents else self._size(node)

    def _size(self, node: fx.Node) -> int | None:
        if node not in self.sizes:
            self.sizes[node] = _bytes(node.meta.get("val"))
        return self.sizes[node]


def is_free(node: fx.Node) -> bool:
    """Is the node a view, a size or one of several results, which move no bytes?"""
    return node.op == "call_function" and _kind(node.target) not in (_Kind.FUSIBLE, _Kind.CALL)


@cache
def _kind(target: Any) -> _Kind:
    if target is operator.getitem:
        return _Kind.RESULT
    if not isinstance(target, torch._ops.OpOverload):
        # Python functions compute sizes; higher-order ops stand for kernels.
        is_kernel = isinstance(target, torch._ops.HigherOrderOperator)
        return _Kind.CALL if is_kernel else _Kind.NUMBER
    if target is aten.sym_size.int:
        return _Kind.NUMBER
    aliases = [r.alias_info for r in target._schema.returns]
    if target is aten._unsafe_view.default or any(a and not a.is_write for a in aliases):
        return _Kind.VIEW
    name = target._schema.name.partition("::")[2]
    is_own = target.namespace == NAMESPACE
    if torch.Tag.pointwise in target.tags or is_own or name in _FUSIBLE:
        return _Kind.FUSIBLE
    return _Kind.CALL


def _bytes(value: Any) -> int | None:
    if isinstance(value, (tuple, list)):
        return _sum(map(_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    total = value.dtype.itemsize
    for size in value.shape:
        hint = size if isinstance(size, int) else _hint(size)
        if hint is None:
            return None
        total *= hint
    return total


def _hint(size: Any) -> int | None:
    """The size with which the graph was traced; asking for it adds no guard."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return hint if isinstance(hint, int) else None


def _smaller(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else min(a, b)


def _sum(terms: Iterable[int | None]) -> int | None:
    total = 0
    for term in terms:
        if term is None:
            return None
        total += term
    return total
