"""Evaluate a cast's scalar ops on a fixed probe of blocks and name what they compute.

The outcome is compared bit for bit with ``functional.mx_cast`` under every scale mode; the probe
holds each exponent with the mantissas around which the modes differ, and the special values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.numerics.cast import Quantized, quantize
from mxnorm_pass.numerics.e8m0 import E8M0_NAN
from mxnorm_pass.numerics.formats import CAST_MODES, ELEMENT_DTYPES, BlockFormat
from mxnorm_pass.passes.match.casts.program import Program


def recognize(
    blocks: fx.Node, nodes: Sequence[fx.Node], values: fx.Node, scales: fx.Node
) -> BlockFormat | None:
    """The MX format that a region casts to; None if it is none.

    Args:
        blocks: [..., B], the node from which all is computed.
        nodes: the region in topological order, constants included.
        values: the region's node of float8 elements.
        scales: the region's node of one byte per block.
    """
    value, elem = tensor_of(blocks), tensor_of(values)
    assert value is not None and elem is not None
    block_size = value.shape[-1]
    if not isinstance(block_size, int) or block_size < 2:
        return None
    program = Program.of([blocks], nodes, [values, scales])
    if program is None:
        return None
    return _classify(program, value.dtype, elem.dtype, block_size)


@lru_cache(maxsize=256)
def _classify(
    program: Program, source: torch.dtype, elem: torch.dtype, block_size: int
) -> BlockFormat | None:
    """Run the program on the probe and find the scale mode that gives the same bits."""
    with real_tensors():
        probe = _probe(source, elem, block_size)
        try:
            values, scales = program(probe)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        # "rceil-log2" comes last: of bfloat16 and float16 it gives the bits of "rceil".
        for mode in CAST_MODES:
            fmt = BlockFormat.of(elem, mode, block_size)
            if _same_cast(values, scales, quantize(probe, fmt)):
                return fmt
    return None


def _same_cast(values: Tensor, scales: Tensor, want: Quantized) -> bool:
    """Equality bit for bit, where all NaNs count as one: also those that a NaN scale makes."""
    if values.numel() != want.values.numel() or values.dtype != want.values.dtype:
        return False
    scale, want_scale = (s.view(torch.uint8).flatten() for s in (scales, want.scales))
    if not torch.equal(scale, want_scale):
        return False
    a, b = values.reshape(want.values.shape), want.values
    both_nan = a.float().isnan() & b.float().isnan()
    same = (a.view(torch.uint8) == b.view(torch.uint8)) | both_nan
    return bool((same | (want_scale == E8M0_NAN).view(-1, 1)).all())


def _probe(dtype: torch.dtype, elem: torch.dtype, block_size: int) -> Tensor:
    """Blocks [N, block_size] that tell the scale modes apart."""
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
    quotient = largest / ELEMENT_DTYPES[elem].max
    largest = largest[(quotient <= 2.0**-127) | (quotient.float() > 2.0**-127)]
    shape = torch.linspace(-1, 1, block_size - 1, dtype=torch.float64)
    shape = torch.cat([torch.ones(1, dtype=torch.float64), shape * 2.0 ** -(shape.abs() * 12)])
    probe = (largest[:, None] * shape[None, :]).to(dtype)
    return torch.cat([probe, _special_blocks(dtype, block_size)])


def _special_blocks(dtype: torch.dtype, block_size: int) -> Tensor:
    inf, nan = float("inf"), float("nan")
    firsts: Sequence[float] = (0.0, -0.0, nan, inf, -inf, torch.finfo(dtype).max)
    blocks = torch.ones(len(firsts) + 1, block_size, dtype=dtype)
    for row, first in enumerate(firsts):
        blocks[row, 0] = first
    blocks[-1] = 0.0
    return blocks
