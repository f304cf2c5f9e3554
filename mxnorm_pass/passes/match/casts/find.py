"""Find every MX cast of a graph by what it computes.

A cast is the region between a tensor viewed as blocks and two results: float8 values and one
scale per block. Spellings differ by torchao version, scale mode and chip, so the region is not
compared with patterns but evaluated, see ``recognize``. Casts that are one op or one kernel,
whose inside no graph shows, are known by name, see ``known_ops``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import (
    aten,
    dtype_of,
    forward_users,
    is_backward,
    is_call,
    is_dtype_cast,
    is_view,
    same_size,
    tensor_of,
)
from mxnorm_pass.numerics.formats import CAST_MODES, ELEMENT_DTYPES, BlockFormat, block_format
from mxnorm_pass.passes.match.casts.known_ops import CastOp, cast_op
from mxnorm_pass.passes.match.casts.program import CONSTANTS
from mxnorm_pass.passes.match.casts.recognize import recognize
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason

_MAX_REGION = 200
_HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Cast:
    """A recognised MX cast.

    Attributes:
        source: the node whose elements are cast; a view of the tensor, in blocks or not.
        values: node of float8 elements, in ``source``'s row-major order.
        scales: node of one E8M0 scale (or its byte) per block, row-major.
        format: what it computes.
        nodes: everything from ``source`` (excluded) to values and scales.
        tensor_scale: node of the scale of the tensor, in formats that have one; None for 1.
    """

    source: fx.Node
    values: fx.Node
    scales: fx.Node
    format: BlockFormat
    nodes: frozenset[fx.Node]
    tensor_scale: fx.Node | None = None


@dataclass(frozen=True)
class UnknownCast:
    """A float8 cast of blocks that computes no known MX cast.

    Attributes:
        source: what is cast.
        skip: the refusal of a norm that it reads.
    """

    source: fx.Node
    skip: Skip


def find_casts(graph: fx.Graph, backward: bool = False) -> list[Cast | UnknownCast]:
    """All float8 casts of the forward graph, recognised or not, in graph order.

    Args:
        backward: those of the backward, too.
    """
    found: list[Cast | UnknownCast] = []
    for node in graph.nodes:
        if node.op != "call_function" or (is_backward(node) and not backward):
            continue
        if node.target is ops.cast:
            found.append(_own_cast(node))
        elif (op := cast_op(node)) is not None:
            found.append(_opaque_cast(node, op))
        elif is_dtype_cast(node) and dtype_of(node) in ELEMENT_DTYPES:
            region = _collect_region(node)
            if region is not None:
                found.append(_match_region(node, region))
    return found


def casts_of(source: fx.Node) -> list[Cast]:
    """The recognised casts of exactly this node on its side of a joint graph.

    From the source to the float8 elements there is a way through nodes of as many elements.
    """
    found: list[Cast | UnknownCast] = []
    seen, pending = {source}, [source]
    while pending and len(seen) <= _MAX_REGION:
        for user in _readers(pending.pop()):
            if user.target is ops.cast and user.args[0] is source:
                found.append(_own_cast(user))
            if user in seen or not _has_size_of(user, source):
                continue
            seen.add(user)
            if is_dtype_cast(user) and dtype_of(user) in ELEMENT_DTYPES:
                region = _collect_region(user)
                if region is not None and region.blocks is source:
                    found.append(_match_region(user, region))
            else:
                pending.append(user)
    return [cast for cast in found if isinstance(cast, Cast)]


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the node in its own half of a joint graph."""
    return list(node.users) if is_backward(node) else forward_users(node)


def _has_size_of(node: fx.Node, other: fx.Node) -> bool:
    a, b = tensor_of(node), tensor_of(other)
    return a is not None and b is not None and same_size(a.numel(), b.numel())


def _own_cast(node: fx.Node) -> Cast:
    source, name, *tensor_scale = node.args
    outputs = {user.args[1]: user for user in node.users}
    return Cast(
        source=source,  # type: ignore[arg-type]
        values=outputs[0],
        scales=outputs[1],
        format=block_format(name),  # type: ignore[arg-type]
        nodes=frozenset((node, *node.users)),
        tensor_scale=next(iter(tensor_scale), None),  # type: ignore[arg-type]
    )


def _unknown(source: fx.Node, node: fx.Node, detail: str, expected: str) -> UnknownCast:
    return UnknownCast(source, Skip(SkipReason.CAST_NOT_RECOGNIZED, detail, node, expected))


def _opaque_cast(node: fx.Node, op: CastOp) -> Cast | UnknownCast:
    outputs = {user.args[1]: user for user in node.users}
    values, scales = outputs.get(op.values), outputs.get(op.scales)
    if op.format is None or values is None or scales is None:
        return _unknown(op.source, node, f"{op.name} is not known", "a known cast op")
    return Cast(op.source, values, scales, op.format, frozenset((node, values, scales)))


def _match_region(values: fx.Node, region: _Region) -> Cast | UnknownCast:
    blocks = region.blocks
    scales = _find_scales(region)
    if scales is None:
        detail = "no scale of one byte per block comes with the values"
        return _unknown(blocks, values, detail, "E8M0 scales beside the values")
    leak = _leak(region, scales)
    if leak is not None:
        detail = f"{leak} inside the cast is read from outside"
        return _unknown(blocks, leak, detail, "values and scales as the cast's only results")
    nodes = (*region.nodes, *(n for n in scales.nodes if n not in region.nodes))
    fmt = recognize(blocks, nodes, values, scales.node)
    if fmt is None:
        detail = f"the cast to {values.name} matches no MX scale mode"
        return _unknown(blocks, values, detail, f"the bits of {', '.join(CAST_MODES)}")
    last_values, last_scales = last_view(values), last_view(scales.node)
    return Cast(
        blocks, last_values, last_scales, fmt, frozenset((*nodes, last_values, last_scales))
    )


@dataclass(frozen=True)
class _Region:
    """``nodes`` in topological order, all computed from ``blocks`` and constants."""

    blocks: fx.Node
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Scales:
    node: fx.Node
    nodes: tuple[fx.Node, ...]


def _collect_region(values: fx.Node) -> _Region | None:
    """Walk back from the float8 values to the one blocked view that they come from."""
    blocks: fx.Node | None = None
    order: dict[fx.Node, None] = {}
    visited: set[fx.Node] = {values}
    stack = [(values, iter(values.all_input_nodes))]
    while stack:
        node, inputs = stack[-1]
        child = next(inputs, None)
        if child is None:
            order[node] = None
            stack.pop()
        elif child not in visited:
            visited.add(child)
            if _is_blocked_view(child, values):
                if blocks is not None:
                    return None
                blocks = child
            elif child.op == "get_attr":
                order[child] = None
            elif child.op != "call_function" or len(visited) > _MAX_REGION:
                return None
            else:
                stack.append((child, iter(child.all_input_nodes)))
    return _Region(blocks, tuple(order)) if blocks is not None else None


def _is_blocked_view(node: fx.Node, values: fx.Node) -> bool:
    """A reshape of a high-precision tensor to [..., block size], the float8 values' shape."""
    value, result = tensor_of(node), tensor_of(values)
    if not is_view(node) or value is None or result is None:
        return False
    source = tensor_of(node.args[0])  # type: ignore[arg-type]
    if source is None or value.dtype not in _HIGH_PRECISION or value.ndim < 2:
        return False
    reshaped = source.ndim != value.ndim or not same_size(source.shape[-1], value.shape[-1])
    return reshaped and same_size(value.numel(), result.numel())


def _find_scales(region: _Region) -> _Scales | None:
    """The node that holds the scales' bytes: E8M0 if the graph says so, else bare uint8."""
    bytes_: list[fx.Node] = []
    for node in region.nodes:
        value = tensor_of(node)
        if value is not None and value.dtype == torch.uint8 and not is_view(node):
            bytes_.append(node)
    for node in reversed(bytes_):
        trail = _trail_to_e8m0(node)
        if trail is not None:
            return _Scales(trail[-1], trail)
    inside = set(region.nodes)
    for node in reversed(bytes_):
        if any(user not in inside for user in _readers(node)):
            return _Scales(node, (node,))
    return None


def _trail_to_e8m0(node: fx.Node) -> tuple[fx.Node, ...] | None:
    pending: list[tuple[fx.Node, ...]] = [(node,)]
    while pending:
        trail = pending.pop()
        for user in _readers(trail[-1]):
            value = tensor_of(user)
            if value is None:
                continue
            if is_call(user, (aten.view.dtype,)) and value.dtype == torch.float8_e8m0fnu:
                return (*trail, user)
            if is_view(user):
                pending.append((*trail, user))
    return None


def _leak(region: _Region, scales: _Scales) -> fx.Node | None:
    """A node of the cast that the graph reads past values and scales."""
    inside = {*region.nodes, *scales.nodes}
    for node in (*region.nodes[:-1], *scales.nodes):
        if node.op == "get_attr" or node.target in CONSTANTS or node is scales.node:
            continue
        if any(user not in inside for user in node.users):
            return node
    return None


def last_view(node: fx.Node) -> fx.Node:
    """Follow reshapes that only serve to give the result its final shape."""
    while True:
        users = list(node.users)
        if len(users) != 1 or not is_view(users[0]):
            return node
        node = users[0]
