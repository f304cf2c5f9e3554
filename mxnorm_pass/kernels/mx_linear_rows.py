"""A few rows times up to three weights, all in MXFP8, on tensor cores.

A program makes a tile of y. All that it multiplies comes through shared memory, copied stages
ahead; its warps share out the blocks of a stage. Each block of 32 is one product of e4m3 elements
as float16, exact and summed in float32 (unlike Hopper's own products of float8, whose sums have 14
bits), and is scaled then: nothing is rounded, no scale multiplied into an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.coverage import MX_LINEAR_WORDS
from mxnorm_pass.kernels.device.fragments import (
    blocks_of,
    e4m3_as_float16,
    e8m0_value,
    nan_bytes,
    words_of_lanes,
)
from mxnorm_pass.kernels.linears import Linear, launch_arguments

# Triton 3.9 knows the copy by its new name alone, 3.6 by the old one.
copy_to_shared = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)


@gluon.jit
def mx_linear_rows_kernel(
    x_ptr, x_scales_ptr, weight_0, weight_1, weight_2, scales_0, scales_1, scales_2,
    bias_0, bias_1, bias_2, y_0, y_1, y_2, columns_0, columns_1, columns_2, rows,
    K: gl.constexpr, M: gl.constexpr, N: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: tiles of N columns of the first y, then of the second's and third's, if any.

    Args:
        x_ptr, weight_: words of four elements.
        x_scales_ptr, scales_: words of four blocks' scales.
        rows: of x and y; at most M.
        K: width of x; a multiple of 128 W, the elements of a stage.
        W: how many warps there are.
    """
    program = gl.program_id(0)
    tiles_0, tiles_1 = gl.cdiv(columns_0, N), gl.cdiv(columns_1, N)
    linear = (program >= tiles_0).to(gl.int32) + (program >= tiles_0 + tiles_1).to(gl.int32)
    tile = program - gl.where(linear > 0, tiles_0, 0) - gl.where(linear > 1, tiles_1, 0)
    columns = _chosen(linear, columns_0, columns_1, columns_2)
    weight_ptr = _chosen(linear, weight_0, weight_1, weight_2)
    scales_ptr = _chosen(linear, scales_0, scales_1, scales_2)

    left = columns - tile * N
    weight_at = _words_at(weight_ptr + (tile * N).to(gl.int64) * (K // 4), N, left, K // 4, W)
    weight_scales_at = _scales_at(scales_ptr + tile * N * (K // 128), N, left, K // 128, W)
    x_at = _words_at(x_ptr, M, rows, K // 4, W)
    x_scales_at = _scales_at(x_scales_ptr, M, rows, K // 128, W)
    sources = (weight_at, weight_scales_at, x_at, x_scales_at)
    weight_words, weight_scales = _stages(N, W, STAGES)
    x_words, x_scales = _stages(M, W, STAGES)
    stages = (weight_words, weight_scales, x_words, x_scales)
    steps: gl.constexpr = K // (128 * W)
    for step in gl.static_range(STAGES - 1):
        _begin_copy(step, steps, sources, stages, STAGES)

    fragment: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    total = gl.zeros([W, N, M], gl.float32, fragment)
    weight_nan = gl.zeros([W, N, 1], gl.int32, fragment)
    x_nan = gl.zeros([W, 1, M], gl.int32, fragment)
    # Triton 3.6 fails where it knows that a loop has but one step.
    for step in range(steps if steps > 1 else gl.where(rows > 0, 1, 0)):
        async_copy.wait_group(STAGES - 2)
        stage = step % STAGES
        weight = blocks_of(weight_words.index(stage).load(words_of_lanes(N, W)), W)
        x = blocks_of(x_words.index(stage).load(words_of_lanes(M, W)), W)
        of_weight = weight_scales.index(stage).permute([1, 0]).load(gl.SliceLayout(2, fragment))
        of_x = x_scales.index(stage).permute([1, 0]).load(gl.SliceLayout(1, fragment))
        of_weight, of_x = gl.expand_dims(of_weight, 2), gl.expand_dims(of_x, 1)
        weight_nan |= nan_bytes(of_weight)
        x_nan |= nan_bytes(of_x)
        _begin_copy(step + STAGES - 1, steps, sources, stages, STAGES)
        for block in gl.static_range(4):
            product = _product(weight[block], x[block], fragment)
            total += product * e8m0_value(of_weight, block) * e8m0_value(of_x, block)

    y = gl.sum(gl.where((weight_nan | x_nan) != 0, float("nan"), total), 0)
    y_ptr = _chosen(linear, y_0, y_1, y_2)
    _store(y, y_ptr, tile, rows, columns, linear, bias_0, bias_1, bias_2)


@gluon.jit
def _store(y, y_ptr, tile, rows, columns, linear, bias_0, bias_1, bias_2):
    """The tile, [N, M], and the linear's bias, where it is inside of y."""
    column = tile * y.shape[0] + gl.arange(0, y.shape[0], gl.SliceLayout(1, y.type.layout))
    row = gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))
    if bias_0 is not None:
        bias_ptr = _chosen(linear, bias_0, bias_1, bias_2)
        # What is read again is not stored.
        bias = gl.load(bias_ptr + gl.minimum(column, columns - 1))
        y += bias.to(gl.float32)[:, None]
    y_at = y_ptr + row[None, :] * columns + column[:, None]
    inside = (row < rows)[None, :] & (column < columns)[:, None]
    gl.store(y_at, y.to(y_ptr.dtype.element_ty), inside)


@gluon.jit
def _chosen(linear, first, second, third):
    if second is None:
        return first
    elif third is None:
        return first if linear == 0 else second
    else:
        return first if linear == 0 else (second if linear == 1 else third)


@gluon.jit
def _words_at(ptr, R: gl.constexpr, rows, PITCH: gl.constexpr, W: gl.constexpr):
    """Where the first step's words of R rows are; beyond the last its own, which nobody uses.

    Apart, the pointer and offsets: together they take twice the registers.
    """
    coalesced: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])
    row = gl.minimum(gl.arange(0, R, gl.SliceLayout(1, coalesced)), rows - 1)
    word = gl.arange(0, 32 * W, gl.SliceLayout(0, coalesced))
    return ptr, row[:, None] * PITCH + word[None, :]


@gluon.jit
def _scales_at(ptr, R: gl.constexpr, rows, PITCH: gl.constexpr, W: gl.constexpr):
    """The same of words of scales, one for each warp."""
    of_rows: gl.constexpr = gl.BlockedLayout([1, W], [32, 1], [W, 1], [1, 0])
    row = gl.minimum(gl.arange(0, R, gl.SliceLayout(1, of_rows)), rows - 1)
    word = gl.arange(0, W, gl.SliceLayout(0, of_rows))
    return ptr, row[:, None] * PITCH + word[None, :]


@gluon.jit
def _stages(R: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for the words of R rows, and for their scales."""
    # Eight rows' pieces of 16 bytes, which ``ldmatrix`` reads at once, lie in different banks.
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words = gl.allocate_shared_memory(gl.int32, [STAGES, R, 32 * W], swizzled)
    return words, gl.allocate_shared_memory(gl.int32, [STAGES, R, W], plain)


@gluon.jit
def _begin_copy(step, steps, sources, stages, STAGES: gl.constexpr):
    """Copy a step's operands, or, beyond the last, nothing; one group of copies in any case."""
    if step < steps:
        for i in gl.static_range(4):
            stage = stages[i].index(step % STAGES)
            copy_to_shared(stage, sources[i][0] + step * stage.shape[1] + sources[i][1])
    async_copy.commit_group()


@gluon.jit
def _product(weight, x, fragment: gl.constexpr):
    """One block's, [W, N, M] in float32."""
    left: gl.constexpr = gl.DotOperandLayout(0, fragment, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, fragment, 2)
    a = gl.convert_layout(e4m3_as_float16(weight), left, assert_trivial=True)
    x = gl.permute(e4m3_as_float16(x), (0, 2, 1))
    b = gl.convert_layout(x, right, assert_trivial=True)
    shape: gl.constexpr = [a.shape[0], a.shape[1], b.shape[2]]
    return mma_v2(a, b, gl.zeros(shape, gl.float32, fragment))


# From here on programs are many, and each may be large.
_MANY_COLUMNS = 8192


@dataclass(frozen=True)
class RowsTiling:
    """How a call is cut into programs.

    Attributes:
        rows, columns: of y in a program; powers of two, from 8 and 16 on.
        warps: a power of two; the width is a multiple of 128 for each.
        stages: copies in flight, and one that is read.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def configuration(rows: int, columns: int, width: int) -> RowsTiling:
    """For any shape that is covered; of the fastest on an H200.

    Args:
        columns: of all the weights.
    """
    most = 2 if columns >= _MANY_COLUMNS and 8 < rows <= 16 else 4
    warps = next(w for w in (most, 2, 1) if width % (128 * w) == 0)
    tile = max(8, triton.next_power_of_2(rows))
    if columns >= _MANY_COLUMNS:
        if rows <= 8:
            # Of fewer warps each would need more registers than there are.
            return RowsTiling(tile, 64 if warps == 4 else 32, warps, stages=3)
        return RowsTiling(tile, 32, warps, stages=4 if rows <= 16 else 2)
    # Few programs, and little work in each: more of them.
    if columns <= 2048 or (rows > 4 and width <= 4096):
        return RowsTiling(tile, 16, warps, stages=4 if rows <= 16 else 3)
    return RowsTiling(tile, 32, warps, stages=4)


def mx_linear_rows(
    x: Tensor, x_scales: Tensor, linears: Sequence[Linear], config: RowsTiling | None = None
) -> None:
    """Of x [M, K] float8_e4m3fn, its scales as bytes [M, K / 32]; writes each linear's y [M, N]."""
    rows, width = x.shape
    config = config or configuration(rows, sum(linear.columns for linear in linears), width)
    tiles = [triton.cdiv(linear.columns, config.columns) for linear in linears]
    launch.launcher(mx_linear_rows_kernel)[(sum(tiles),)](
        x.view(MX_LINEAR_WORDS),
        x_scales.view(MX_LINEAR_WORDS),
        *launch_arguments(linears, MX_LINEAR_WORDS),
        rows,
        K=width,
        M=config.rows,
        N=config.columns,
        W=config.warps,
        STAGES=config.stages,
        num_warps=config.warps,
    )
