"""The nodes between a tensor viewed as blocks and the elements and scales of its cast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.nodes import (
    aten,
    forward_users,
    interleaves,
    is_backward,
    is_call,
    is_dtype_cast,
    is_every_other,
    is_view,
    same_shape,
    same_size,
    tensor_of,
)
from mxnorm_pass.passes.match.casts.program import CONSTANTS, REDUCTIONS

MAX_REGION = 200
HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)
# dtypes in which a graph holds scales: E8M0's byte or its own type, and that of NVFP4.
_BYTES, _E8M0, _E4M3 = torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn


@dataclass(frozen=True)
class Region:
    """What is computed from blocks, constants and maybe a tensor's scale.

    Attributes:
        blocks: [..., B], of high precision.
        nodes: in topological order.
        per_byte: elements that share a byte of the values.
        tensor_scale: [] float32, which is computed elsewhere.
    """

    blocks: fx.Node
    nodes: tuple[fx.Node, ...]
    per_byte: int = 1
    tensor_scale: fx.Node | None = None


@dataclass(frozen=True)
class Scales:
    """The node that holds one scale per block, and those that lead there within the cast."""

    node: fx.Node
    nodes: tuple[fx.Node, ...]


def packs_half_bytes(node: fx.Node) -> bool:
    """Does it make bytes of every other element and those between them?"""
    value = tensor_of(node)
    if value is None or value.dtype != _BYTES or not is_call(node, (aten.bitwise_or.Tensor,)):
        return False
    operands = [_before_shift(arg) for arg in node.args]  # type: ignore[arg-type]
    return len(operands) == 2 and all(map(is_every_other, operands))


def may_be_bytes_of_elements(node: fx.Node) -> bool:
    """The sign and the magnitude of elements put together, one to a byte?"""
    value = tensor_of(node)
    if value is None or value.dtype != _BYTES or not is_call(node, (aten.bitwise_or.Tensor,)):
        return False
    return not any(is_every_other(user) for user in _users_behind_views(node))


def _users_behind_views(node: fx.Node) -> list[fx.Node]:
    found, pending = [], [node]
    while pending:
        for user in pending.pop().users:
            found.append(user)
            if is_view(user):
                pending.append(user)
    return found


def _before_shift(node: fx.Node) -> fx.Node:
    source = node.args[0] if isinstance(node, fx.Node) and node.args else None
    return source if isinstance(source, fx.Node) and not is_every_other(node) else node


def collect_region(values: fx.Node, per_byte: int = 1) -> Region | None:
    """Walk back from the values to the one blocked view that they come from."""
    blocks: fx.Node | None = None
    numbers: set[fx.Node] = set()
    order: dict[fx.Node, None] = {}
    visited: set[fx.Node] = {values}
    stack = [(values, iter(_operands(values)))]
    while stack:
        node, inputs = stack[-1]
        child = next(inputs, None)
        if child is None:
            order[node] = None
            stack.pop()
        elif child not in visited:
            visited.add(child)
            if _is_blocked_view(child, values, per_byte):
                if blocks is not None:
                    return None
                blocks = child
            elif child.op == "get_attr":
                order[child] = None
            elif _is_computed_number(child):
                numbers.add(child)
            elif child.op != "call_function" or len(visited) > MAX_REGION:
                return None
            else:
                stack.append((child, iter(_operands(child))))
    if blocks is None:
        return None
    tensor_scale = min(numbers, default=None)
    between = _between(tensor_scale, numbers)
    if between is None:
        return None
    return Region(blocks, tuple(sorted({*order, *between})), per_byte, tensor_scale)


def _operands(node: fx.Node) -> list[fx.Node]:
    """What it reads but for sizes, which may be symbolic."""
    return [n for n in node.all_input_nodes if n.op == "get_attr" or tensor_of(n) is not None]


def keeps_blocks_apart(region: Region) -> bool:
    """Does every element depend on its own block alone, and every number per block, too?

    A program of numbers says nothing of shapes: a maximum over several blocks' maxima, or a scale
    that is broadcast along another dimension, would look like what stays within a block.
    """
    blocks = tensor_of(region.blocks)
    return blocks is not None and all(_is_within_blocks(node, blocks) for node in region.nodes)


def _is_within_blocks(node: fx.Node, blocks: Tensor) -> bool:
    value = tensor_of(node)
    if value is None or node.op == "get_attr" or node.target in CONSTANTS or is_view(node):
        return True
    if node.target in REDUCTIONS:
        source = tensor_of(node.args[0])  # type: ignore[arg-type]
        return source is not None and same_shape(source.shape, blocks.shape)
    if is_every_other(node) or interleaves(node):
        return True
    operands = [t for n in _operands(node) if (t := tensor_of(n)) is not None]
    return all(_meets_its_block(operand, value, blocks.shape[-1]) for operand in operands)


def _meets_its_block(operand: Tensor, result: Tensor, block_size: int) -> bool:
    if operand.ndim == 0 or same_shape(operand.shape, result.shape):
        return True
    *leading, last = operand.shape
    one_each = same_size(last, 1) and same_size(result.shape[-1], block_size)
    return one_each and same_shape(leading, result.shape[:-1])


def _is_blocked_view(node: fx.Node, values: fx.Node, per_byte: int) -> bool:
    """A reshape of a high-precision tensor to [..., block size], of as many elements."""
    value, result = tensor_of(node), tensor_of(values)
    if not is_view(node) or value is None or result is None:
        return False
    source = tensor_of(node.args[0])  # type: ignore[arg-type]
    if source is None or not source.ndim or value.ndim < 2:
        return False
    if value.dtype not in HIGH_PRECISION:
        return False
    if result.dtype == _BYTES and _merges_blocks(source, value):
        return False
    reshaped = source.ndim != value.ndim or not same_size(source.shape[-1], value.shape[-1])
    return reshaped and same_size(value.numel(), result.numel() * per_byte)


def _merges_blocks(source: Tensor, view: Tensor) -> bool:
    """As where elements are encoded when they are in rows again."""
    sizes = source.shape[-1], view.shape[-1]
    return all(isinstance(size, int) for size in sizes) and sizes[0] < sizes[1]


def _between(first: fx.Node | None, numbers: set[fx.Node]) -> set[fx.Node] | None:
    """What the other numbers are computed from, down to the first; None if from something else."""
    found: set[fx.Node] = set()
    pending = [number for number in numbers if number is not first]
    while pending:
        node = pending.pop()
        value = tensor_of(node)
        if value is None or value.ndim or node.op not in ("get_attr", "call_function"):
            return None
        if node not in found:
            found.add(node)
            pending += [source for source in node.all_input_nodes if source is not first]
    return found


def _is_computed_number(node: fx.Node) -> bool:
    """A number in float32 that is no constant of the graph."""
    value = tensor_of(node)
    if value is None or value.ndim or value.dtype != torch.float32:
        return False
    pending = [node]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node.op not in ("get_attr", "call_function") or len(seen) > MAX_REGION:
            return True
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
            if any((t := tensor_of(n)) is not None and t.ndim for n in node.all_input_nodes):
                return True
    return False


def find_scales(region: Region) -> Scales | None:
    """The node that holds the scales: E8M0 if the graph says so, e4m3, else bare bytes."""
    one_each = [n for n in region.nodes if not is_view(n) and _is_one_per_block(n, region)]
    bytes_ = [n for n in one_each if tensor_of(n).dtype == _BYTES]  # type: ignore[union-attr]
    for node in reversed(bytes_):
        trail = _trail_to_e8m0(node)
        if trail is not None:
            return Scales(trail[-1], trail)
    for node in reversed(one_each):
        if is_dtype_cast(node) and tensor_of(node).dtype == _E4M3:  # type: ignore[union-attr]
            return Scales(node, (node,))
    inside = set(region.nodes)
    for node in reversed(bytes_):
        if any(user not in inside for user in readers_in_half(node)):
            return Scales(node, (node,))
    return None


def _is_one_per_block(node: fx.Node, region: Region) -> bool:
    value, blocks = tensor_of(node), tensor_of(region.blocks)
    if value is None or blocks is None:
        return False
    if _is_float8(region):
        return value.dtype == _BYTES
    # Where elements are bytes, too, it is their number that tells.
    of_blocks = same_size(value.numel() * blocks.shape[-1], blocks.numel())
    return value.dtype in (_BYTES, _E4M3) and of_blocks


def _is_float8(region: Region) -> bool:
    value: Tensor | None = tensor_of(region.nodes[-1])
    return value is not None and value.dtype != _BYTES


def _trail_to_e8m0(node: fx.Node) -> tuple[fx.Node, ...] | None:
    pending: list[tuple[fx.Node, ...]] = [(node,)]
    while pending:
        trail = pending.pop()
        for user in readers_in_half(trail[-1]):
            value = tensor_of(user)
            if value is None:
                continue
            if is_call(user, (aten.view.dtype,)) and value.dtype == _E8M0:
                return (*trail, user)
            if is_view(user):
                pending.append((*trail, user))
    return None


def readers_in_half(node: fx.Node) -> list[fx.Node]:
    """Who reads the node in its own half of a joint graph."""
    return list(node.users) if is_backward(node) else forward_users(node)


def leak(region: Region, scales: Scales) -> fx.Node | None:
    """A node of the cast that the graph reads past values and scales."""
    inside = {*region.nodes, *scales.nodes}
    for node in (*region.nodes[:-1], *scales.nodes):
        if node.op == "get_attr" or node.target in CONSTANTS or node is scales.node:
            continue
        if any(user not in inside for user in node.users):
            return node
    return None
