"""Recognise the dequantisation of a cast by what it computes.

Emulated matmuls multiply values by decoded scales in the dtype of the matmul, in many nodes. Their
arithmetic is evaluated on every element code with every scale byte; that each value meets its own
block's scale is read off the shapes::

    values [..., D] -> dtype -> view [N, B] ----------+
    scales [..., K] -> decode -> dtype -> view [N, 1] -> mul -> view -> matmul
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, fx

from mxnorm_pass import ops
from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import (
    dtype_of,
    interleaves,
    is_backward,
    is_call,
    is_transpose,
    is_view,
    same_shape,
    tensor_of,
)
from mxnorm_pass.numerics.cast import Quantized
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.passes.match.casts.find import Cast, last_view
from mxnorm_pass.passes.match.casts.program import Program
from mxnorm_pass.passes.match.linears.products import PRODUCTS, QuantizedMatmul


def dequantization(cast: Cast, linear: QuantizedMatmul) -> fx.Node | None:
    """The node on the way to the matmul that holds what ``functional.mx_dequantize`` gives.

    Its elements are those of the cast's source in row-major order. None where the arithmetic or
    the layout is another, or where the backward reads it: it would keep a tensor twice as large.
    """
    products = [n for n in linear.slice if n not in linear.of_scales and is_call(n, PRODUCTS)]
    if len(products) != 1:
        return None
    (product,) = products
    if product.target is ops.dequantize:
        values, scales, name, _, *tensor_scale = product.args
        own = (values, scales, name, next(iter(tensor_scale), None))
        known = own == (cast.values, cast.scales, cast.format.name, cast.tensor_scale)
    else:
        known = _multiplies_blocks(product, cast, linear) and _is_exact(product, cast)
    end = last_view(product)
    return end if known and not _backward_reads(end) and _has_known_shape(end, cast) else None


def _backward_reads(node: fx.Node) -> bool:
    """Does a backward node read the tensor, maybe through views?"""
    pending = [node]
    while pending:
        node = pending.pop()
        if is_backward(node):
            return True
        pending += [u for u in node.users if is_backward(u) or is_view(u) or is_transpose(u)]
    return False


def _multiplies_blocks(product: fx.Node, cast: Cast, linear: QuantizedMatmul) -> bool:
    """Does each value, in row-major order, meet the scale of its own block?"""
    inside = {*linear.slice, cast.values, cast.scales}
    for node in linear.slice:
        # Nothing is broadcast on the way, so that values and scales are as many as in the cast.
        keeps_elements = is_view(node) or interleaves(node)
        if node < product and not keeps_elements and not _keeps_shape(node, inside):
            return False
    operands = product.args
    if not all(isinstance(n, fx.Node) and n in inside for n in operands):
        return False
    by_scale = [n in linear.of_scales or n is cast.scales for n in operands]
    if sorted(by_scale) != [False, True]:
        return False
    values, scales = (tensor_of(operands[by_scale.index(held)]) for held in (False, True))  # type: ignore[arg-type]
    result = tensor_of(product)
    assert values is not None and scales is not None and result is not None
    if not same_shape(values.shape, result.shape) or values.ndim != scales.ndim or not values.ndim:
        return False
    if (values.shape[-1], scales.shape[-1]) != (cast.format.block_size, 1):
        return False
    # Of two dimensions the first has as many rows as there are blocks, for values and scales.
    return values.ndim == 2 or same_shape(values.shape[:-1], scales.shape[:-1])


def _keeps_shape(node: fx.Node, inside: set[fx.Node]) -> bool:
    own = tensor_of(node)
    inputs = [tensor_of(n) for n in node.all_input_nodes if n in inside]
    return own is not None and all(i is not None and same_shape(i.shape, own.shape) for i in inputs)


def _is_exact(product: fx.Node, cast: Cast) -> bool:
    sources = (cast.values, cast.scales)
    program = Program.of(sources, computation(product, sources), [product])
    if program is None or cast.tensor_scale is not None:
        return False
    return dequantizes(program, cast.format, dtype_of(cast.scales), dtype_of(product))


def computation(result: fx.Node, sources: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of tensors from ``sources`` (excluded) to ``result``, constants included."""
    found: set[fx.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node not in found and node not in sources and tensor_of(node) is not None:
            found.add(node)
            pending += node.all_input_nodes
    return sorted(found)


@lru_cache(maxsize=256)
def dequantizes(
    program: Program, fmt: BlockFormat, scale: torch.dtype, result: torch.dtype
) -> bool:
    """Does the program give the bits of ``functional.mx_dequantize`` on whatever it is given?"""
    with real_tensors():
        every_byte = torch.arange(256, dtype=torch.uint8)
        codes = every_byte[: 2 ** (fmt.element.bits * fmt.element.per_byte)]
        values = codes.repeat(256, 1).view(fmt.elem_dtype)
        scales = every_byte.view(256, 1)
        try:
            (got,) = program(values, scales.view(scale))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False
        want = Quantized(values, scales.view(fmt.scale_dtype), fmt).dequantize(result)
        return _same_bits(got, want)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality bit for bit, where all NaNs count as one."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = (a == b) & (a.signbit() == b.signbit())
    return bool((same | (a.isnan() & b.isnan())).all())


def _has_known_shape(node: fx.Node, cast: Cast) -> bool:
    """Can its shape be given to another tensor of as many elements, before it is computed?"""
    own, values = tensor_of(node), tensor_of(cast.values)
    assert own is not None and values is not None
    symbolic = sum(not isinstance(size, int) for size in own.shape)
    return symbolic <= 1 or same_shape(own.shape, values.shape)
