"""Recognise an operand of a matmul that is a dequantised tensor, whoever has cast it.

``mxnorm_pass::dequantize`` says what it is. What a library spells out in ATen ops is recognised as
in ``dequantize``: by evaluating it on every element code with every scale byte. Here no cast need
be known: values and scales are the nearest nodes of bytes from which alone both factors of the
product come, be they inputs of the graph or results of a cast::

    values [..., K] -> dtype -> view [N, B] ---+
    scales [..., K / B] -> decode -> [N, 1] ---+-> mul -> view [..., K]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import (
    aten,
    dtype_of,
    interleaves,
    is_call,
    is_dtype_cast,
    is_transpose,
    is_view,
    same_shape,
    same_size,
    strip,
    tensor_of,
)
from mxnorm_pass.numerics.formats import ELEMENTS, BlockFormat, block_format
from mxnorm_pass.passes.match.casts.program import CONSTANTS, Program
from mxnorm_pass.passes.match.linears.dequantize import computation, dequantizes
from mxnorm_pass.passes.match.linears.products import is_constant

_E8M0 = torch.float8_e8m0fnu
_BYTES = frozenset({torch.uint8, _E8M0, *(e.dtype for e in ELEMENTS.values())})
# From a matmul to the bytes of 4-bit elements there are some thirty nodes.
_MAX_STEPS = 64
# Elements of 4 bits are codes in bytes of their own before they share one.
_MAX_CANDIDATES = 3


@dataclass(frozen=True)
class Widened:
    """A dequantised tensor [..., K].

    Attributes:
        values: [..., K], or [..., K / 2] where two elements share a byte.
        scales: [..., K / B], of the format's dtype or, for E8M0, in bytes.
        format: of both. How scales were chosen it does not say where no op does.
        dtype: in which they are multiplied.
        tensor_scale: None for 1.
    """

    values: fx.Node
    scales: fx.Node
    format: BlockFormat
    dtype: torch.dtype
    tensor_scale: fx.Node | None = None


def widened_operand(operand: fx.Node, transposed: bool) -> Widened | None:
    """The tensor [..., K] that a matmul reads as [M, K], or ``transposed`` as [K, N].

    None where it is dequantised otherwise, or its blocks are not along K.
    """
    node = operand
    while True:
        if is_transpose(node):
            transposed = not transposed
        elif not keeps_rows(node, transposed):
            break
        node = node.args[0]  # type: ignore[assignment]
    return None if transposed else _widened(node)


def keeps_rows(node: fx.Node, transposed: bool = False) -> bool:
    """A view whose rows, or columns where it is a transpose, are those of what it views."""
    if not is_view(node):
        return False
    source, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    if source is None or result is None or not source.ndim or not result.ndim:
        return False
    if transposed:
        return same_shape(source.shape, result.shape)
    return same_size(source.shape[-1], result.shape[-1])


def _widened(node: fx.Node) -> Widened | None:
    if node.target is ops.dequantize:
        values, scales, name, dtype, *tensor_scale = node.args
        of_tensor = next(iter(tensor_scale), None)
        return Widened(values, scales, block_format(name), dtype, of_tensor)  # type: ignore[arg-type]
    product = strip(node, is_view, is_dtype_cast)
    if not is_call(product, (aten.mul.Tensor,)):
        return None
    for values, scales in (product.args, product.args[::-1]):
        if _are_blocks_and_scales(values, scales, product):
            return _spelled_out(node, product, values, scales)  # type: ignore[arg-type]
    return None


def _are_blocks_and_scales(values: object, scales: object, product: fx.Node) -> bool:
    """Does each value of the first meet the scale of its own block in the second?"""
    if not isinstance(values, fx.Node) or not isinstance(scales, fx.Node):
        return False
    blocks, scale, result = (tensor_of(n) for n in (values, scales, product))
    if blocks is None or scale is None or result is None or blocks.ndim < 2:
        return False
    *leading, size = blocks.shape
    in_blocks = same_shape(blocks.shape, result.shape) and isinstance(size, int)
    return in_blocks and same_shape(scale.shape, (*leading, 1))


def _spelled_out(
    end: fx.Node, product: fx.Node, values: fx.Node, scales: fx.Node
) -> Widened | None:
    scale_bytes = next(_bytes_behind(scales), None)
    if scale_bytes is None:
        return None
    block_size = tensor_of(values).shape[-1]  # type: ignore[union-attr]
    for elements in islice(_bytes_behind(values), _MAX_CANDIDATES):
        for fmt in _formats(elements, scale_bytes, block_size):
            found = Widened(elements, scale_bytes, fmt, dtype_of(end))
            if _has_rows_of(found, end) and _is_exact(found, end, product):
                return found
    return None


def _bytes_behind(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of bytes from which alone ``node`` is computed, the nearest first."""
    pending = {node}
    for _ in range(_MAX_STEPS):
        if not pending:
            return
        node = max(pending)
        pending.remove(node)
        if not pending and dtype_of(node) in _BYTES and not _reads_as_bytes(node):
            yield node
        pending |= set(_inputs(node))


def _reads_as_bytes(node: fx.Node) -> bool:
    """Is it E8M0 or the like, looked at as bytes?"""
    return is_call(node, (aten.view.dtype,)) and dtype_of(node.args[0]) in _BYTES


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that it depends on."""
    if node.target in CONSTANTS:
        return []
    tensors = [n for n in node.all_input_nodes if tensor_of(n) is not None]
    return [n for n in tensors if not is_constant(n)]


def _formats(values: fx.Node, scales: fx.Node, block_size: int) -> Iterator[BlockFormat]:
    """Those of which values and scales may be; they do not show the scale mode."""
    if dtype_of(scales) not in (torch.uint8, _E8M0):
        return
    for element in ELEMENTS.values():
        if element.dtype == dtype_of(values) and block_size % element.per_byte == 0:
            yield BlockFormat(element, block_size=block_size)


def _has_rows_of(found: Widened, end: fx.Node) -> bool:
    """Do values and scales belong together, row by row, and to the tensor?"""
    values, scales, result = (tensor_of(n) for n in (found.values, found.scales, end))
    assert values is not None and scales is not None and result is not None
    if not values.ndim or not isinstance(values.shape[-1], int):
        return False
    shape = found.format.shape_of(values.shape)
    return same_shape(shape, result.shape) and same_shape(
        scales.shape, found.format.scales_shape(shape)
    )


def _is_exact(found: Widened, end: fx.Node, product: fx.Node) -> bool:
    """Has the node the bits of ``mxnorm_pass::dequantize``, whatever it is given?"""
    sources = (found.values, found.scales)
    nodes = computation(end, sources)
    if not all(n is product or _keeps_elements(n) for n in nodes):
        return False
    program = Program.of(sources, nodes, [end])
    if program is None:
        return False
    return dequantizes(program, found.format, dtype_of(found.scales), found.dtype)


def _keeps_elements(node: fx.Node) -> bool:
    """Are its elements computed one by one from those in the same row-major place?"""
    if is_view(node) or interleaves(node) or not _inputs(node):
        return True
    own = tensor_of(node)
    sources = (tensor_of(n) for n in _inputs(node))
    return own is not None and all(
        s is not None and same_shape(s.shape, own.shape) for s in sources
    )
