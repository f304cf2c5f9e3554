"""One row times up to three weights, all in MXFP8, on the cores that take float32.

A thread widens 16 elements of a weight at a time and multiplies them by those of x, which it keeps
for all rows of the weight that its program takes; the products of a block are scaled once. At 3.6
instructions for each element of a weight the memory is what limits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.device.mx import e8m0_value
from mxnorm_pass.kernels.linears import Linear, launch_arguments

_LARGEST_CHUNK = 2048
# What a thread reads at once, 16 bytes of the weight.
_PER_THREAD = 16


@triton.jit
def mx_linear_row_kernel(
    x_ptr, x_scales_ptr, weight_0, weight_1, weight_2, scales_0, scales_1, scales_2,
    bias_0, bias_1, bias_2, y_0, y_1, y_2, columns_0, columns_1, columns_2,
    K: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N elements of the first y, then of the second's and third's, if any.

    Args:
        K: width of x; a multiple of ``CHUNK``.
    """
    program = tl.program_id(0)
    tiles_0, tiles_1 = tl.cdiv(columns_0, N), tl.cdiv(columns_1, N)
    linear = (program >= tiles_0).to(tl.int32) + (program >= tiles_0 + tiles_1).to(tl.int32)
    tile = program - tl.where(linear > 0, tiles_0, 0) - tl.where(linear > 1, tiles_1, 0)
    columns = chosen(linear, columns_0, columns_1, columns_2)
    weight_ptr = chosen(linear, weight_0, weight_1, weight_2)
    weight_scales_ptr = chosen(linear, scales_0, scales_1, scales_2)
    y_ptr = chosen(linear, y_0, y_1, y_2)
    column = tile * N + tl.arange(0, N)
    # What is read again is not stored.
    n = tl.minimum(column, columns - 1).to(tl.int64)[:, None]
    at = tl.arange(0, CHUNK)
    block = tl.arange(0, CHUNK // 32)
    total = tl.zeros([N, CHUNK // 32], tl.float32)
    for k in tl.range(0, K, CHUNK):
        scales_at = weight_scales_ptr + n * (K // 32) + (k // 32 + block)[None, :]
        weight_at = weight_ptr + n * K + (k + at)[None, :]
        scales = e8m0_value(tl.load(scales_at).to(tl.int32))
        weight = widened(tl.load(weight_at, eviction_policy="evict_first"))
        x = widened(tl.load(x_ptr + k + at))
        products = tl.reshape(weight * x[None, :], [N, CHUNK // 32, 32])
        x_scales = e8m0_value(tl.load(x_scales_ptr + k // 32 + block).to(tl.int32))
        total += tl.sum(products, 2) * scales * x_scales[None, :]
    y = tl.sum(total, 1)
    if bias_0 is not None:
        bias_ptr = chosen(linear, bias_0, bias_1, bias_2)
        y += tl.load(bias_ptr + tl.minimum(column, columns - 1)).to(tl.float32)
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), column < columns)


@triton.jit
def chosen(linear, first, second, third):
    """That of the linear; those that are None are of linears that are not there."""
    if second is None:
        return first
    elif third is None:
        return first if linear == 0 else second
    else:
        return first if linear == 0 else (second if linear == 1 else third)


@triton.jit
def widened(elements):
    """E4M3 elements as float32, by way of float16, which holds each."""
    return elements.to(tl.float16).to(tl.float32)


@dataclass(frozen=True)
class RowTiling:
    """How a call is cut into programs.

    Attributes:
        columns: of y in a program; a power of two.
        chunk: along K that is read at a time; a power of two that divides K.
        warps: per program.
    """

    columns: int
    chunk: int
    warps: int


def configuration(width: int) -> RowTiling:
    """For any width that is covered."""
    # The largest power of two in the width; a thread reads twice of each row.
    chunk = min(_LARGEST_CHUNK, width & -width)
    return RowTiling(2, chunk, max(1, chunk // (2 * 32 * _PER_THREAD)))


def mx_linear_row(
    x: Tensor, x_scales: Tensor, linears: Sequence[Linear], config: RowTiling | None = None
) -> None:
    """Of x [1, K] float8_e4m3fn, its scales as bytes [1, K / 32]; writes each linear's y [1, N]."""
    width = x.shape[1]
    config = config or configuration(width)
    tiles = [triton.cdiv(linear.columns, config.columns) for linear in linears]
    launch.launcher(mx_linear_row_kernel)[(sum(tiles),)](
        x,
        x_scales,
        *launch_arguments(linears),
        K=width,
        N=config.columns,
        CHUNK=config.chunk,
        num_warps=config.warps,
    )
