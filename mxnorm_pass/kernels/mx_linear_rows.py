"""Few rows times a weight, both in MXFP8, on tensor cores.

A program makes a tile of y, and its warps share out the blocks along K. Each block of 32 is one
product of e4m3 elements in float32, which Triton gives to Hopper's tensor cores as float16
(exactly, unlike their own float8 products, whose sums have 14 bits), and is scaled then: no element
is widened to bfloat16 and no scale multiplied into one.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.coverage import MX_LINEAR_WORDS
from mxnorm_pass.kernels.device.mx import e8m0_value


@triton.jit
def mx_linear_rows_kernel(
    x_ptr, x_scales_ptr, weight_ptr, weight_scales_ptr, bias_ptr, y_ptr, rows, columns,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N columns of y, tiles of M rows.

    Args:
        x_scales_ptr, weight_scales_ptr: words of four blocks' scales, K / 128 for each row.
        K: width of x; a multiple of 128 W.
        W: words of scales, and four times as many blocks, that are read at a time.
    """
    column = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.program_id(1) * M + tl.arange(0, M)
    inside = row < rows
    # What is read again is not stored.
    n = tl.minimum(column, columns - 1).to(tl.int64)
    word = tl.arange(0, W)
    block = tl.arange(0, 32)
    x_at = x_ptr + row[None, None, :] * K + word[:, None, None] * 128 + block[None, :, None]
    weight_at = weight_ptr + n[None, :, None] * K + word[:, None, None] * 128 + block[None, None, :]
    x_scales_at = x_scales_ptr + row[None, :] * (K // 128) + word[:, None]
    weight_scales_at = weight_scales_ptr + n[None, :] * (K // 128) + word[:, None]
    total = tl.zeros([W, N, M], tl.float32)
    for i in tl.range(0, K // (128 * W), num_stages=STAGES):
        scales = tl.load(weight_scales_at + i * W, eviction_policy="evict_first")
        x_scales = tl.load(x_scales_at + i * W, inside[None, :], 0)
        for byte in tl.static_range(4):
            k = (i * W * 4 + byte) * 32
            weight = tl.load(weight_at + k, eviction_policy="evict_first")
            x = tl.load(x_at + k, inside[None, None, :], 0)
            weight = weight.to(tl.float8e4nv, bitcast=True)
            product = tl.dot(weight, x.to(tl.float8e4nv, bitcast=True))
            product *= e8m0_value((scales >> (8 * byte)) & 0xFF)[:, :, None]
            total += product * e8m0_value((x_scales >> (8 * byte)) & 0xFF)[:, None, :]
    y = tl.sum(total, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    y_at = y_ptr + row[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), (column < columns)[:, None] & inside[None, :])


@dataclass(frozen=True)
class RowsTiling:
    """How a call is cut into programs.

    Attributes:
        rows, columns: of y in a program; powers of two, from 8 and 16 on.
        words: of scales that are read at a time, one for each warp.
        stages: reads in flight.
    """

    rows: int
    columns: int
    words: int
    stages: int


def configuration(rows: int, columns: int, width: int) -> RowsTiling:
    """For any shape that is covered."""
    # Few columns are few programs, which want more warps.
    most = 2 if rows <= 8 and columns >= 4096 else 4
    words = next(w for w in (4, 2, 1) if w <= most and width % (w * 128) == 0)
    if rows <= 8:
        return RowsTiling(8, 16, words, stages=4)
    return RowsTiling(16 if rows <= 16 else 32, 32, words, stages=3)


def mx_linear_rows(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: RowsTiling | None = None,
) -> None:
    """Of bytes: x [M, K], weight [N, K], scales of a byte for each 32; writes y [M, N]."""
    (rows, width), columns = x.shape, weight.shape[0]
    config = config or configuration(rows, columns, width)
    grid = (triton.cdiv(columns, config.columns), triton.cdiv(rows, config.rows))
    launch.launcher(mx_linear_rows_kernel)[grid](
        x,
        x_scales.view(MX_LINEAR_WORDS),
        weight,
        weight_scales.view(MX_LINEAR_WORDS),
        bias,
        y,
        rows,
        columns,
        K=width,
        M=config.rows,
        N=config.columns,
        W=config.words,
        STAGES=config.stages,
        num_warps=config.words,
    )
