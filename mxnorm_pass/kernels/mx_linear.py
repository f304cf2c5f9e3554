"""Few rows times a weight, both in MXFP8: the weight is read once, in its 8 bits.

A program makes a tile of y, and its warps share out the blocks along K. Each block of 32 is one
product of e4m3 elements in float32, which Hopper's tensor cores take as float16 (exactly, unlike
their own float8 products, whose sums have 14 bits), and is scaled then: no element is widened to
bfloat16 and no scale multiplied into one. Rows are read 128 bytes and more at a time into shared
memory, from where the tensor cores' registers are filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.coverage import MX_LINEAR_WORDS
from mxnorm_pass.numerics.formats import MX_BLOCK_SIZE


@triton.jit
def scales_of_words(words, R: tl.constexpr, B: tl.constexpr):
    """Words [R, B / 4] of four E8M0 bytes each, as float32 [B, R]: 0 is 2^-127, 255 NaN."""
    shift = (tl.arange(0, 4) * 8)[None, None, :]
    bits = ((words[:, :, None] >> shift) & 0xFF) << 23
    bits = tl.maximum(bits, 0x00400000)
    bits = tl.where(bits == 0x7F800000, 0x7FC00000, bits)
    return tl.permute(tl.reshape(bits, [R, B]), (1, 0)).to(tl.float32, bitcast=True)


@triton.jit
def mx_linear_kernel(
    x_ptr, x_scales_ptr, weight_ptr, weight_scales_ptr, bias_ptr, y_ptr, rows, columns,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N columns of y, tiles of M rows.

    Args:
        x_scales_ptr, weight_scales_ptr: words of four blocks' scales, K / 128 for each row.
        K: width of x; a multiple of 32 B.
        B: blocks that are read at a time.
    """
    column = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.program_id(1) * M + tl.arange(0, M)
    inside = row < rows
    # What is read again is not stored.
    n = tl.minimum(column, columns - 1).to(tl.int64)
    at = tl.arange(0, B)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    word = tl.arange(0, B // 4)[None, :]
    x_at = x_ptr + row[:, None, None] * K + at
    x_scales_at = x_scales_ptr + row[:, None] * (K // 128) + word
    weight_at = weight_ptr + n[:, None, None] * K + at
    weight_scales_at = weight_scales_ptr + n[:, None] * (K // 128) + word
    total = tl.zeros([B, N, M], tl.float32)
    for i in tl.range(0, K // (32 * B), num_stages=STAGES):
        words = tl.load(weight_scales_at + i * (B // 4), eviction_policy="evict_first")
        x_words = tl.load(x_scales_at + i * (B // 4), inside[:, None], 0)
        weight = tl.load(weight_at + i * (32 * B), eviction_policy="evict_first")
        x = tl.load(x_at + i * (32 * B), inside[:, None, None], 0)
        weight = tl.permute(weight, (1, 0, 2)).to(tl.float8e4nv, bitcast=True)
        x = tl.permute(x, (1, 2, 0)).to(tl.float8e4nv, bitcast=True)
        product = tl.dot(weight, x) * scales_of_words(words, N, B)[:, :, None]
        total += product * scales_of_words(x_words, M, B)[:, None, :]
    y = tl.sum(total, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    y_at = y_ptr + row[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), (column < columns)[:, None] & inside[None, :])


@dataclass(frozen=True)
class LinearTiling:
    """How a call is cut into programs.

    Attributes:
        rows, columns: of y in a program; powers of two, from 8 and 16 on.
        blocks: along K that are read at a time; a multiple of the warps, and of 4.
        warps: per program.
        stages: reads in flight.
    """

    rows: int
    columns: int
    blocks: int
    warps: int
    stages: int


def configuration(rows: int, columns: int, width: int) -> LinearTiling:
    """For any shape that is covered."""
    # A warp's sums fit its registers: of two blocks with 16 rows, of one with 32.
    tiling = {8: (16, 16, 4), 16: (32, 16, 8), 32: (32, 8, 8)}
    tile_rows = min(32, max(8, triton.next_power_of_2(rows)))
    tile_columns, most, warps = tiling[tile_rows]
    blocks = next(b for b in (16, 8, 4) if b <= most and width % (b * MX_BLOCK_SIZE) == 0)
    return LinearTiling(tile_rows, tile_columns, blocks, min(warps, blocks), stages=3)


def mx_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    config: LinearTiling | None = None,
) -> Tensor:
    """``mxnorm_pass::mx_linear`` of operands in MXFP8 e4m3, summed in float32.

    The reference widens both operands to ``dtype`` and multiplies these. Results differ by the
    order of the sums, at most 2 K 2^-24 times the sum of |x| |w|, where ``dtype`` holds the widened
    operands exactly, and by the last rounding to ``dtype``. bfloat16 loses bits below 2^-126 that
    are kept here. A weight's scale from 2^105 on overflows here unless its elements are small.

    Args:
        x: [M, K] float8_e4m3fn; K a multiple of 128.
        x_scales: [M, K / 32] float8_e8m0fnu.
        weight: [N, K] float8_e4m3fn.
        weight_scales: [N, K / 32] float8_e8m0fnu.
        bias: [N] or None.

    Returns:
        [M, N] of ``dtype``.
    """
    (rows, width), columns = x.shape, weight.shape[0]
    config = config or configuration(rows, columns, width)
    y = x.new_empty((rows, columns), dtype=dtype)
    grid = (triton.cdiv(columns, config.columns), triton.cdiv(rows, config.rows))
    launch.launcher(mx_linear_kernel)[grid](
        x.view(torch.uint8),
        _words(x_scales),
        weight.view(torch.uint8),
        _words(weight_scales),
        bias,
        y,
        rows,
        columns,
        K=width,
        M=config.rows,
        N=config.columns,
        B=config.blocks,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return y


def _words(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8).view(MX_LINEAR_WORDS)
