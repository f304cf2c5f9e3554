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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import fx

from mxnorm_pass.graph.code import add_bytes
from mxnorm_pass.graph.nodes import aten
from mxnorm_pass.ops import OPS
from mxnorm_pass.report.snapshot import NodeState, Snapshot
from mxnorm_pass.report.subgraph import Traffic

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
    ROWS = auto()  # a call that picks rows of its first input


_OWN: dict[str, _Kind] = {
    "pointwise": _Kind.FUSIBLE, "library": _Kind.CALL, "none": _Kind.NUMBER
}  # fmt: skip
_MOVING = (_Kind.FUSIBLE, _Kind.CALL, _Kind.ROWS)


@dataclass(slots=True, eq=False)
class _Call:
    """What a call does with memory.

    Attributes:
        stored: the node whose memory holds the value: what a view looks at, else the node itself.
        extent: bytes of memory behind the value.
        reads: the memory that it reads, and how much of it; None where it moves nothing.
        bytes: that it moves as a kernel of its own.
        fusible: runs in one kernel with others.
    """

    state: NodeState
    stored: fx.Node
    extent: int | None
    reads: Mapping[fx.Node, int | None] | None = None
    bytes: int | None = 0
    fusible: bool = False


class TrafficEstimate:
    """What each node of a graph moves, as the graph stood in a snapshot.

    Args:
        earlier: of an earlier snapshot; what it knows of nodes that stayed as they were holds.

    Attributes:
        total: of the whole graph.
    """

    def __init__(self, snapshot: Snapshot, earlier: TrafficEstimate | None = None) -> None:
        self.snapshot = snapshot
        self._calls: dict[fx.Node, _Call] = {}
        known = earlier._calls if earlier is not None else {}
        moved: set[fx.Node] = set()
        for node, state in snapshot.calls():
            call = known.get(node)
            if call is None or call.state is not state or not moved.isdisjoint(state.inputs):
                old, call = call, self._call(node, state)
                if old is None or (old.stored, old.extent) != (call.stored, call.extent):
                    moved.add(node)
            self._calls[node] = call
        returned = {self._memory(node)[0] for node in snapshot.output.inputs}
        self.total = self.of(list(self._calls), returned)

    def of(self, nodes: Sequence[fx.Node], read_outside: Collection[fx.Node]) -> Traffic:
        """Some nodes in graph order; ``read_outside`` are those whose values others read, too."""
        unfused = add_bytes(map(self.of_op, nodes))
        fused = add_bytes(self._crossings(nodes, read_outside)) if unfused is not None else None
        return Traffic(unfused, fused)

    def of_op(self, node: fx.Node) -> int | None:
        """Bytes that the op moves as a kernel of its own; 0 for views; None where unknown."""
        call = self._calls.get(node)
        return 0 if call is None else call.bytes

    def _call(self, node: fx.Node, state: NodeState) -> _Call:
        kind = _kind(state.target)
        if kind is _Kind.VIEW and state.inputs:
            stored, extent = self._memory(state.inputs[0])
            return _Call(state, stored, _smaller(state.type.bytes, extent))
        if kind not in _MOVING:
            return _Call(state, node, state.type.bytes)
        read = [self._memory(source) for source in state.inputs]
        if kind is _Kind.ROWS:
            stored, extent = read[0]
            read[0] = stored, _smaller(extent, state.type.bytes)
        moved = add_bytes([state.type.bytes, *[size for _, size in read]])
        # Of what is read through several views, the first counts.
        reads = dict(reversed(read))
        return _Call(state, node, state.type.bytes, reads, moved, kind is _Kind.FUSIBLE)

    def _memory(self, node: fx.Node) -> tuple[fx.Node, int | None]:
        """The node whose memory holds the value, and how much of it is behind the value."""
        call = self._calls.get(node)
        if call is None:
            return node, self.snapshot.states[node].type.bytes
        return call.stored, call.extent

    def _crossings(
        self, nodes: Sequence[fx.Node], read_outside: Collection[fx.Node]
    ) -> Iterator[int | None]:
        """Bytes of each read of a kernel from outside of it, and of each value that it writes.

        A kernel is the fusible nodes after the same number of library calls, or one such call.
        """
        known = self._calls
        depth: dict[fx.Node, int] = {}
        # Numbered: of fusible nodes from 0 on, of library calls below.
        kernels: dict[fx.Node, int | None] = {}
        read: set[tuple[fx.Node, int]] = set()
        written = {self._memory(node)[0] for node in read_outside}
        for node in nodes:
            call = known.get(node)
            if call is None:
                continue
            if call.reads is None:
                for source in call.state.inputs[:1]:
                    stored, _ = self._memory(source)
                    depth[node], kernels[node] = depth.get(stored, 0), kernels.get(stored)
                continue
            calls = max([depth.get(source, 0) for source in call.reads], default=0)
            kernel = 2 * calls + call.state.backward if call.fusible else ~len(depth)
            kernels[node], depth[node] = kernel, calls if call.fusible else calls + 1
            for source, size in call.reads.items():
                if kernels.get(source) != kernel and (source, kernel) not in read:
                    read.add((source, kernel))
                    written.add(source)
                    yield size
        states = self.snapshot.states
        yield from (states[node].type.bytes for node in written if kernels.get(node) is not None)


def is_free(node: fx.Node) -> bool:
    """Is the node a view, a size or one of several results, which move no bytes?"""
    return node.op == "call_function" and _kind(node.target) not in _MOVING


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
    if target in _PICKS_ROWS:
        return _Kind.ROWS
    aliases = [r.alias_info for r in target._schema.returns]
    if target is aten._unsafe_view.default or any(a and not a.is_write for a in aliases):
        return _Kind.VIEW
    if target in OPS:
        return _OWN[OPS[target].traffic]
    name = target._schema.name.partition("::")[2]
    if torch.Tag.pointwise in target.tags or name in _FUSIBLE:
        return _Kind.FUSIBLE
    return _Kind.CALL


def _smaller(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else min(a, b)
