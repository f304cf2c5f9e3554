"""Find every MX cast of a graph by what it computes.

A cast is the region between a tensor viewed as blocks and two results: values in float8, or in
bytes that hold elements of 4 or 6 bits, and one scale per block. Spellings differ by torchao
version, scale mode and chip, so the region is not compared with patterns but evaluated, see
``recognize``. Casts that are one op or one kernel, whose inside no graph shows, are known by name,
see ``known_ops``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import (
    dtype_of,
    is_backward,
    is_dtype_cast,
    is_view,
    same_size,
    tensor_of,
)
from mxnorm_pass.numerics.formats import CAST_MODES, ELEMENT_DTYPES, BlockFormat, block_format
from mxnorm_pass.passes.match.casts.known_ops import CastOp, cast_op
from mxnorm_pass.passes.match.casts.recognize import recognize
from mxnorm_pass.passes.match.casts.region import (
    MAX_REGION,
    Region,
    collect_region,
    find_scales,
    leak,
    may_be_bytes_of_elements,
    packs_half_bytes,
    readers_in_half,
)
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason


@dataclass(frozen=True)
class Cast:
    """A recognised MX cast.

    Attributes:
        source: the node whose elements are cast; a view of the tensor, in blocks or not.
        values: node of float8 elements, or of the bytes that hold elements, in ``source``'s
            row-major order.
        scales: node of one E8M0 scale (or its byte) or e4m3 scale per block, row-major.
        format: what it computes.
        nodes: everything from ``source`` (excluded) to values and scales.
        tensor_scale: node of the scale of the tensor, in formats that have one; None for 1.
        square_blocks: rows share scales, too.
    """

    source: fx.Node
    values: fx.Node
    scales: fx.Node
    format: BlockFormat
    nodes: frozenset[fx.Node]
    tensor_scale: fx.Node | None = None
    square_blocks: bool = False


@dataclass(frozen=True)
class UnknownCast:
    """A cast to few bits that computes no known MX cast.

    Attributes:
        source: what is cast.
        skip: the refusal of a norm that it reads.
    """

    source: fx.Node
    skip: Skip


def find_casts(graph: fx.Graph, backward: bool = False) -> list[Cast | UnknownCast]:
    """All casts to few bits of the forward graph, recognised or not, in graph order.

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
        else:
            found += _casts_ending_at(node)
    return found


def _casts_ending_at(node: fx.Node) -> list[Cast | UnknownCast]:
    """The cast, recognised or not, whose elements the node holds; none for another node."""
    if is_dtype_cast(node) and dtype_of(node) in ELEMENT_DTYPES:
        region = collect_region(node)
    elif packs_half_bytes(node):
        region = collect_region(node, per_byte=2)
    elif may_be_bytes_of_elements(node):
        # Many things are bytes: these count only as what they are found to be.
        region = collect_region(node)
        matched = _match_region(node, region) if region is not None else None
        return [matched] if isinstance(matched, Cast) else []
    else:
        return []
    return [_match_region(node, region)] if region is not None else []


def casts_of(source: fx.Node) -> list[Cast]:
    """The recognised casts of exactly this node on its side of a joint graph.

    From the source to the float8 elements there is a way through nodes of as many elements.
    """
    found: list[Cast | UnknownCast] = []
    seen, pending = {source}, [source]
    while pending and len(seen) <= MAX_REGION:
        for user in readers_in_half(pending.pop()):
            if user.target is ops.cast and user.args[0] is source:
                found.append(_own_cast(user))
            if user in seen or not _has_size_of(user, source):
                continue
            seen.add(user)
            if is_dtype_cast(user) and dtype_of(user) in ELEMENT_DTYPES:
                region = collect_region(user)
                if region is not None and region.blocks is source:
                    found.append(_match_region(user, region))
            else:
                pending.append(user)
    return [cast for cast in found if isinstance(cast, Cast)]


def _has_size_of(node: fx.Node, other: fx.Node) -> bool:
    a, b = tensor_of(node), tensor_of(other)
    return a is not None and b is not None and same_size(a.numel(), b.numel())


def _own_cast(node: fx.Node) -> Cast | UnknownCast:
    source, name, *options = node.args
    tensor_scale = options[0] if options else None
    outputs = {user.args[1]: user for user in node.users}
    values, scales = outputs.get(0), outputs.get(1)
    if values is None or scales is None:
        return _half_read(source, node)  # type: ignore[arg-type]
    return Cast(
        source=source,  # type: ignore[arg-type]
        values=values,
        scales=scales,
        format=block_format(name),  # type: ignore[arg-type]
        nodes=frozenset((node, *node.users)),
        tensor_scale=tensor_scale,  # type: ignore[arg-type]
        square_blocks=options[1:] == [True],
    )


def _unknown(source: fx.Node, node: fx.Node, detail: str, expected: str) -> UnknownCast:
    return UnknownCast(source, Skip(SkipReason.CAST_NOT_RECOGNIZED, detail, node, expected))


def _half_read(source: fx.Node, node: fx.Node) -> UnknownCast:
    detail = f"of {node.name} only values or only scales are read"
    return _unknown(source, node, detail, "values and scales of a cast")


def _opaque_cast(node: fx.Node, op: CastOp) -> Cast | UnknownCast:
    outputs = {user.args[1]: user for user in node.users}
    values, scales = outputs.get(op.values), outputs.get(op.scales)
    if op.format is None:
        return _unknown(op.source, node, f"{op.name} is not known", "a known cast op")
    if values is None or scales is None:
        return _half_read(op.source, node)
    return Cast(op.source, values, scales, op.format, frozenset((node, values, scales)))


def _match_region(values: fx.Node, region: Region) -> Cast | UnknownCast:
    blocks = region.blocks
    scales = find_scales(region)
    if scales is None:
        detail = "no scale of one byte per block comes with the values"
        return _unknown(blocks, values, detail, "scales beside the values")
    leaks = leak(region, scales)
    if leaks is not None:
        detail = f"{leaks} inside the cast is read from outside"
        return _unknown(blocks, leaks, detail, "values and scales as the cast's only results")
    nodes = (*region.nodes, *(n for n in scales.nodes if n not in region.nodes))
    fmt = recognize(region, nodes, values, scales.node)
    if fmt is None:
        detail = f"the cast to {values.name} matches no MX scale mode"
        return _unknown(blocks, values, detail, f"the bits of {', '.join(CAST_MODES)}")
    last_values, last_scales = last_view(values), last_view(scales.node)
    return Cast(
        blocks,
        last_values,
        last_scales,
        fmt,
        frozenset((*nodes, last_values, last_scales)),
        region.tensor_scale,
    )


def last_view(node: fx.Node) -> fx.Node:
    """Follow reshapes that only serve to give the result its final shape."""
    while True:
        users = list(node.users)
        if len(users) != 1 or not is_view(users[0]):
            return node
        node = users[0]
