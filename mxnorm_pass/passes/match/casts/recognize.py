"""Evaluate a cast's scalar ops on a fixed probe of blocks and name what they compute.

The outcome is compared bit for bit with ``functional.mx_cast`` under every scale mode; the probe
holds each exponent with the mantissas around which the modes differ, and the special values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.numerics.cast import Quantized, quantize
from mxnorm_pass.numerics.e8m0 import E8M0_NAN
from mxnorm_pass.numerics.elements import element_values
from mxnorm_pass.numerics.formats import CAST_MODES, ELEMENTS, NEAREST, BlockFormat
from mxnorm_pass.passes.match.casts.program import Program
from mxnorm_pass.passes.match.casts.region import Region, keeps_blocks_apart

# Some are no powers of two, and one makes the smallest scales of a normalised row.
_TENSOR_SCALES = (1.0, 0.37, 2.0**-11, 1.7e-4)


def recognize(
    region: Region, nodes: Sequence[fx.Node], values: fx.Node, scales: fx.Node
) -> BlockFormat | None:
    """The format that a region casts to; None if it is none.

    Args:
        nodes: the region in topological order, constants included, and what leads to the scales.
        values: the node of its elements.
        scales: the node of one byte per block.
    """
    value, elem, scale = map(tensor_of, (region.blocks, values, scales))
    assert value is not None and elem is not None and scale is not None
    block_size = value.shape[-1]
    if not isinstance(block_size, int) or block_size < 2 or block_size % region.per_byte:
        return None
    if not keeps_blocks_apart(region):
        return None
    inputs = [n for n in (region.blocks, region.tensor_scale) if n is not None]
    program = Program.of(inputs, nodes, [values, scales])
    if program is None:
        return None
    candidates = _candidates(elem.dtype, region.per_byte, scale.dtype, block_size)
    return _classify(program, value.dtype, candidates, region.tensor_scale is not None)


@lru_cache(maxsize=64)
def _candidates(
    elem: torch.dtype, per_byte: int, scale: torch.dtype, block_size: int
) -> tuple[BlockFormat, ...]:
    """Every format whose values and scales are of these dtypes."""
    elements = [e for e in ELEMENTS.values() if (e.dtype, e.per_byte) == (elem, per_byte)]
    if scale == torch.float8_e4m3fn:
        return tuple(BlockFormat(e, NEAREST, block_size, scale) for e in elements if e.bits == 4)
    # "rceil-log2" comes last: of bfloat16 and float16 it gives the bits of "rceil".
    return tuple(BlockFormat(e, mode, block_size) for e in elements for mode in CAST_MODES)


@lru_cache(maxsize=256)
def _classify(
    program: Program, source: torch.dtype, candidates: tuple[BlockFormat, ...], has_scale: bool
) -> BlockFormat | None:
    """Run the program on the probe and find the format that gives the same bits."""
    with real_tensors():
        for fmt in candidates:
            if all(_computes(program, fmt, source, s) for s in _tensor_scales(has_scale)):
                return fmt
    return None


def _tensor_scales(given: bool) -> list[Tensor | None]:
    return [torch.tensor(s) for s in _TENSOR_SCALES] if given else [None]


def _computes(
    program: Program, fmt: BlockFormat, source: torch.dtype, tensor_scale: Tensor | None
) -> bool:
    if tensor_scale is not None and fmt.has_e8m0_scales:
        return False
    probe = _probe(source, fmt, 1.0 if tensor_scale is None else float(tensor_scale))
    inputs = [probe] if tensor_scale is None else [probe, tensor_scale]
    try:
        values, scales = program(*inputs)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return _same_cast(values, scales, quantize(probe, fmt, tensor_scale))


def _same_cast(values: Tensor, scales: Tensor, want: Quantized) -> bool:
    """Equality bit for bit, where all NaNs count as one: also those that a NaN scale makes."""
    if values.numel() != want.values.numel() or values.dtype != want.values.dtype:
        return False
    scale, want_scale = (s.view(torch.uint8).flatten() for s in (scales, want.scales))
    if not torch.equal(scale, want_scale):
        return False
    a, b = (v.reshape(len(scale), -1) for v in (values, want.values))
    same = a.view(torch.uint8) == b.view(torch.uint8)
    if want.format.element.bits == 8:
        same |= a.float().isnan() & b.float().isnan()
    scale_is_nan = want_scale == E8M0_NAN
    if not want.format.has_e8m0_scales:
        scale_is_nan = want.scales.flatten().float().isnan()
    return bool((same | scale_is_nan.view(-1, 1)).all())


@lru_cache(maxsize=64)
def _probe(dtype: torch.dtype, fmt: BlockFormat, tensor_scale: float) -> Tensor:
    """Blocks [N, block_size] that tell the formats and their scale modes apart."""
    block_size = fmt.block_size
    info = torch.finfo(dtype)
    ulp = info.eps
    # Around 1 FLOOR, CEIL and EVEN part; around 1.75 = 448 / 256 (e4m3) and 57344 / 32768 (e5m2)
    # RCEIL does, and its log2 rounds down the float32 above where the exponent is not near 0;
    # around 1.9375 and 1.875 EVEN rounds up to the next power of two.
    edges = [1.0, 1.25, 1.5, 1.75, 1.875, 1.9375]
    mantissas = [m + d * ulp for m in edges for d in (-1, 0, 1) if 1 <= m + d * ulp < 2]
    mantissas.append(2 - ulp)
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    largest = torch.tensor(mantissas, dtype=torch.float64)[None, :] * 2.0 ** exponents[:, None]
    largest = largest.flatten()
    largest = largest[largest <= info.max]
    # The quotient by elem.max is rounded to float32 before PTX or a comparison sees it. That
    # moves one absmax across a power of two: to 2**-127, the smallest scale, which no block of a
    # normalised row or of a weight comes near.
    quotient = largest / fmt.element.max
    largest = largest[(quotient <= 2.0**-127) | (quotient.float() > 2.0**-127)]
    shape = torch.linspace(-1, 1, block_size - 1, dtype=torch.float64)
    shape = torch.cat([torch.ones(1, dtype=torch.float64), shape * 2.0 ** -(shape.abs() * 12)])
    probe = (largest[:, None] * shape[None, :]).to(dtype)
    return torch.cat(
        [probe, _special_blocks(dtype, block_size), _roundings(dtype, fmt, tensor_scale)]
    )


def _roundings(dtype: torch.dtype, fmt: BlockFormat, tensor_scale: float) -> Tensor:
    """Blocks with the elements' values, their midpoints and the numbers next to them, times scales.

    Graphs may round to float8 by a conversion alone, but to fewer bits by their own arithmetic.
    Powers of two as scales change nothing; of the others each tells a division by it from a
    product with its reciprocal.
    """
    element = fmt.element
    if element.bits == 8:
        return torch.empty(0, fmt.block_size, dtype=dtype)
    positive = torch.arange(2 ** (element.bits - 1), dtype=torch.uint8)
    exact = element_values(positive, element, torch.float64).unique()
    points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2])
    scales = torch.ones(1, dtype=torch.float64)
    if not fmt.has_e8m0_scales:
        normal = torch.arange(8, 127, dtype=torch.uint8)
        scales = normal.view(fmt.scale_dtype).double() * tensor_scale
    blocks = [_around((points * s).to(dtype), element.max * s, fmt) for s in scales.tolist()]
    return torch.cat(blocks)


def _around(points: Tensor, largest: float, fmt: BlockFormat) -> Tensor:
    """Blocks of the points, their negatives and what is next to both, each after the largest."""
    dtype = points.dtype
    ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
    near = [torch.nextafter(points, end) for end in ends]
    numbers = torch.cat([points, *near])
    numbers = torch.cat([numbers, -numbers])
    numbers = numbers[numbers.abs() <= largest]
    blocks = torch.full((-(-len(numbers) // (fmt.block_size - 1)), fmt.block_size), largest)
    blocks = blocks.to(dtype)
    rest = blocks[:, 1:].numel() - len(numbers)
    filled = torch.cat([numbers, numbers[:1].expand(rest)])
    blocks[:, 1:] = filled.view(len(blocks), -1)
    return blocks


def _special_blocks(dtype: torch.dtype, block_size: int) -> Tensor:
    inf, nan = float("inf"), float("nan")
    firsts: Sequence[float] = (0.0, -0.0, nan, inf, -inf, torch.finfo(dtype).max)
    blocks = torch.ones(len(firsts) + 1, block_size, dtype=dtype)
    for row, first in enumerate(firsts):
        blocks[row, 0] = first
    blocks[-1] = 0.0
    return blocks
