"""Follow cast and uncast tensors to the matrix multiplications of linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from heapq import heappop, heappush

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.matmul import is_matmul
from mxnorm_pass.graph.nodes import (
    aten,
    dtype_of,
    forward_users,
    interleaves,
    is_call,
    is_view,
    prims,
    same_size,
    strip,
    tensor_of,
)
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.casts.scale_layout import is_blocked, moves_bytes
from mxnorm_pass.passes.match.linears.plain import linear_name

LAYOUT = frozenset({aten.permute.default, aten.t.default, aten.transpose.int, aten.slice.Tensor})
# What turns scales into numbers, beside pointwise ops.
_DECODING = frozenset({aten.view.dtype, aten.where.self, aten.full_like.default, aten.full.default})
_UNPACKING = frozenset({aten.index_put.default})
_CONSTANTS = frozenset({aten.full.default, aten.scalar_tensor.default, aten.zeros.default})
PRODUCTS = frozenset({aten.mul.Tensor, ops.dequantize})


@dataclass(frozen=True)
class QuantizedMatmul:
    """A matmul fed by a cast.

    Attributes:
        name: dotted name of the linear.
        matmul: the matmul node.
        slice: nodes from the cast's values and scales (excluded) to the matmul (excluded), in
            graph order.
        of_scales: those of them that hold nothing but scales.
        blocked_scales: the node that holds the scales in the 128x4 blocked layout for the matmul;
            None where the slice needs them in row-major order.
    """

    name: str
    matmul: fx.Node
    slice: tuple[fx.Node, ...]
    of_scales: frozenset[fx.Node] = frozenset()
    blocked_scales: fx.Node | None = None

    def with_scales_of(self, cast: Cast, width: int) -> QuantizedMatmul:
        """It, as it may read the scales of ``cast`` from an op whose rows are of this width.

        The 128x4 layout depends on the rows, and a cast may have others than the op: of heads that
        were normalised one by one, of all of a token's in one row.
        """
        scales = tensor_of(cast.scales)
        assert scales is not None
        if same_size(scales.shape[-1] * cast.format.block_size, width):
            return self
        return replace(self, blocked_scales=None)


@dataclass(frozen=True)
class CastUse:
    """Who reads a cast in the forward graph; ``escape`` reads it and is no matmul."""

    matmuls: tuple[QuantizedMatmul, ...] = ()
    escape: fx.Node | None = None


def cast_use(cast: Cast) -> CastUse:
    """Follow a cast's values and scales through dequantisation to the matmuls.

    Scales may be decoded by any pointwise ops. Once they multiply the values only layout and
    dtype may change: whatever else is computed from the product, such as an activation function
    or a straight-through estimator's sum, is no plain dequantisation.
    """
    inputs: dict[fx.Node, set[fx.Node]] = {}
    holds: dict[fx.Node, _Holds] = {cast.values: _Holds.VALUES, cast.scales: _Holds.SCALES}
    matmuls: dict[fx.Node, None] = {}
    # In graph order, so that a node's inputs are known before it is.
    queue = sorted(holds)
    while queue:
        node = heappop(queue)
        if node not in holds:
            held = _hold(node, holds, cast.tensor_scale)
            if held is None:
                return CastUse(escape=node)
            holds[node] = held
        for user in forward_users(node):
            if user in cast.nodes:
                # The cast itself reads its scales to scale the elements.
                continue
            if is_matmul(user):
                matmuls[user] = None
            elif user not in inputs and user not in holds:
                heappush(queue, user)
            inputs.setdefault(user, set()).add(node)
    return CastUse(tuple(_quantized_matmul(m, cast, inputs, holds) for m in matmuls))


def _quantized_matmul(
    matmul: fx.Node,
    cast: Cast,
    inputs: Mapping[fx.Node, set[fx.Node]],
    holds: Mapping[fx.Node, _Holds],
) -> QuantizedMatmul:
    nodes = _ancestors(matmul, inputs, (cast.values, cast.scales))
    of_scales = frozenset(n for n in nodes if holds[n] in (_Holds.SCALES, _Holds.BOTH_SCALES))
    operands = [n for n in inputs[matmul] if n in of_scales]
    blocked = operands[0] if len(operands) == 1 and is_blocked(cast.scales, operands[0]) else None
    name = linear_name(matmul) or matmul.name
    return QuantizedMatmul(name, matmul, nodes, of_scales, blocked)


class _Holds(Enum):
    """What a node of a dequantisation is made of: BOTH_SCALES of the blocks' and the tensor's."""

    VALUES = auto()
    SCALES = auto()
    BOTH_SCALES = auto()
    PRODUCT = auto()


_DECODED_SCALES = frozenset({_Holds.SCALES, _Holds.BOTH_SCALES})


def _hold(
    node: fx.Node, holds: Mapping[fx.Node, _Holds], tensor_scale: fx.Node | None
) -> _Holds | None:
    """What ``node`` is made of, None if it is no step of a dequantisation."""
    if _scales_scales(node, holds, tensor_scale):
        return _Holds.BOTH_SCALES
    # Symbolic sizes are inputs too.
    tensors = [n for n in node.all_input_nodes if tensor_of(n) is not None]
    inputs = [n for n in tensors if n is not tensor_scale or node.target is not ops.dequantize]
    known = {holds.get(n) for n in inputs if n in holds or not is_constant(n)}
    if len(known) == 2 and _Holds.VALUES in known and known & _DECODED_SCALES:
        return _Holds.PRODUCT if is_call(node, PRODUCTS) else None
    if len(known) != 1:
        return None
    held = known.pop()
    if is_view(node) or is_call(node, LAYOUT) or _is_conversion(node):
        return held
    if held is _Holds.VALUES and _decodes_bytes(node, inputs):
        return held
    tags = getattr(node.target, "tags", ())
    decodes = torch.Tag.pointwise in tags or is_call(node, _DECODING) or moves_bytes(node)
    return held if held in _DECODED_SCALES and decodes else None


def _scales_scales(
    node: fx.Node, holds: Mapping[fx.Node, _Holds], tensor_scale: fx.Node | None
) -> bool:
    """Does it multiply the blocks' scales by the tensor's, as a dequantisation may?"""
    if tensor_scale is None or not is_call(node, (aten.mul.Tensor,)):
        return False
    others = [n for n in node.args if n is not tensor_scale]
    return len(others) == 1 and holds.get(others[0]) is _Holds.SCALES  # type: ignore[arg-type]


def _decodes_bytes(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """A step from bytes that hold elements of fewer bits to numbers: no arithmetic of numbers."""
    dtypes = {dtype_of(n) for n in inputs if not is_constant(n)}
    if any(dtype.is_floating_point for dtype in dtypes):
        return False
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or interleaves(node) or is_call(node, _DECODING | _UNPACKING)


def is_constant(node: fx.Node) -> bool:
    """A constant, or a part of one, such as the part of a padded tensor that is written to."""
    source = strip(node, is_view, _is_part)
    return is_call(source, _CONSTANTS) or source.op == "get_attr"


def _is_part(node: fx.Node) -> bool:
    return is_call(node, (aten.slice.Tensor,))


def _is_conversion(node: fx.Node) -> bool:
    return is_call(node, (prims.convert_element_type.default, aten._to_copy.default))


def _ancestors(
    node: fx.Node, inputs: Mapping[fx.Node, set[fx.Node]], sources: tuple[fx.Node, ...]
) -> tuple[fx.Node, ...]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        new = inputs.get(pending.pop(), set()) - found - set(sources)
        found |= new
        pending += new
    return tuple(sorted(found))
