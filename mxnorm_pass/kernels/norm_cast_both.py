"""Norm, cast along D and cast along T of one tensor, which is read from DRAM once.

A program has one of two roles. A row program is one of ``norm_cast``'s, which also publishes its
rows' rho. A column program casts a tile of ``R`` rows and ``C`` columns along T, ``LAG`` groups of
``R`` rows later, when its rows' rho is there and x is still in the L2 cache. Programs wait only for
programs of lower numbers, and those start first, so all waits end, whichever of them are resident.
(CUB's scans count on this order, too: ``cub/agent/agent_scan.cuh``. Numbers drawn from an atomic
counter would not need it, but each program would begin with the wait for its own.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.device.cast import scale_blocks
from mxnorm_pass.kernels.device.elements import lay_out_as_bytes, to_elements, words_of
from mxnorm_pass.kernels.device.hadamard import hadamard_matrix
from mxnorm_pass.kernels.device.mx import absmax_bits
from mxnorm_pass.kernels.device.operand import cast_tile, plus
from mxnorm_pass.kernels.device.publish import wait_for
from mxnorm_pass.kernels.device.rounding import INTERPRETED, convert, multiply, narrow, widen
from mxnorm_pass.kernels.norm_cast import cast_rows
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.kernels.operands import key_halves, operand_constants
from mxnorm_pass.kernels.rows import Rows, RowTiling, row_config, tile_blocks
from mxnorm_pass.numerics.norm_cast import NormCastSpec


@triton.jit
def norm_cast_both_kernel(
    x_ptr, residual_ptr, weight_ptr, block_weights_ptr, tensor_scale_ptr, total_ptr, values_ptr,
    scales_ptr, rho_ptr, dequantized_ptr, values_t_ptr, scales_t_ptr, words_ptr, row_blocks,
    x_stride, residual_stride, seed_ptr, key_low, key_high, signs_low, signs_high,
    D: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, EXACT: tl.constexpr,
    P: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr, MODE: tl.constexpr,
    ELEM_DTYPE: tl.constexpr, BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, MAX_MANTISSA: tl.constexpr, CONVERTS: tl.constexpr,
    NORM_DTYPE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr,
    TOTAL_DTYPE: tl.constexpr, BLOCKED_SCALES: tl.constexpr, GAIN_IN_ROWS: tl.constexpr,
    ROWS: tl.constexpr, TILE_K: tl.constexpr, CHUNKS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, LAG: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_T: tl.constexpr, MODE_T: tl.constexpr, ELEM_DTYPE_T: tl.constexpr, BITS_T: tl.constexpr,
    MAX_EXPONENT_T: tl.constexpr, MANTISSA_BITS_T: tl.constexpr, MAX_MANTISSA_T: tl.constexpr,
    CONVERTS_T: tl.constexpr, G_T: tl.constexpr, SIGNS_T: tl.constexpr,
    STOCHASTIC_T: tl.constexpr, HEADROOM_T: tl.constexpr, SQUARE_T: tl.constexpr,
    MATMUL_T: tl.constexpr, USE_T: tl.constexpr,
):  # fmt: skip
    """Grid: the programs of a group, R / ROWS + D / C, times the groups.

    Args:
        words_ptr, row_blocks: int32 zeros [groups R], where rho is published; rows / BLOCK.
        R, LAG: a multiple of 128; groups, at least 1.
        AHEAD: rows between a row program's and those that it asks the L2 cache for; 0: none.
        BLOCK_T, ...: of the cast along T; 0: it is that along D. See ``operand_casts_kernel``.
    """
    ACROSS: tl.constexpr = (D + C - 1) // C
    groups = tl.num_programs(0) // (R // ROWS + ACROSS)
    columns, is_column = role(tl.program_id(0), groups, R // ROWS, ACROSS, LAG)
    rows = row_blocks * BLOCK
    if is_column and BLOCK_T > 0:
        cast_operand_columns(
            x_ptr, residual_ptr, weight_ptr, words_ptr, values_t_ptr, scales_t_ptr, seed_ptr,
            key_low, key_high, signs_low, signs_high, columns // ACROSS * R, columns % ACROSS * C,
            rows, x_stride, residual_stride, D, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE, TOTAL_DTYPE,
            R, C, BLOCK_T, MODE_T, ELEM_DTYPE_T, BITS_T, MAX_EXPONENT_T, MANTISSA_BITS_T,
            MAX_MANTISSA_T, CONVERTS_T, G_T, SIGNS_T, STOCHASTIC_T, HEADROOM_T, SQUARE_T, MATMUL_T,
            USE_T,
        )  # fmt: skip
    elif is_column:
        cast_columns(
            x_ptr, residual_ptr, weight_ptr, tensor_scale_ptr, words_ptr, values_t_ptr,
            scales_t_ptr, columns // ACROSS * R, columns % ACROSS * C, row_blocks, x_stride,
            residual_stride, D, BLOCK, MODE, ELEM_DTYPE, BITS, MAX_EXPONENT, MANTISSA_BITS,
            MAX_MANTISSA, CONVERTS, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE, TOTAL_DTYPE, R, C,
        )  # fmt: skip
    else:
        row_program = tl.program_id(0) - columns
        if AHEAD > 0:
            later = row_program.to(tl.int64) * ROWS + AHEAD + tl.arange(0, ROWS)
            prefetch_rows(x_ptr, later, rows, x_stride, D)
            prefetch_rows(residual_ptr, later, rows, residual_stride, D)
        cast_rows(
            row_program, x_ptr, residual_ptr, weight_ptr if GAIN_IN_ROWS else None,
            block_weights_ptr, tensor_scale_ptr, total_ptr, values_ptr, scales_ptr, rho_ptr,
            words_ptr, dequantized_ptr, rows, x_stride, residual_stride, D, BLOCK, ROWS, TILE_K,
            CHUNKS, EPS, EXACT, P, FACTOR, SCALE, MODE, ELEM_DTYPE, BITS, MAX_EXPONENT,
            MANTISSA_BITS, MAX_MANTISSA, CONVERTS, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE,
            TOTAL_DTYPE, BLOCKED_SCALES, "evict_last",
        )  # fmt: skip


@triton.jit
def role(number, groups, DOWN: tl.constexpr, ACROSS: tl.constexpr, LAG: tl.constexpr):
    """How many column programs come before this one, and is this one of them?

    First come the rows of ``LAG`` groups, then rows and columns in turns, at last columns.

    Args:
        DOWN, ACROSS: row and column programs of a group.
    """
    BOTH: tl.constexpr = DOWN + ACROSS
    lag = tl.minimum(LAG, groups)
    mixed = number - lag * DOWN
    mixed_end = (groups - lag) * BOTH
    turn = tl.maximum(mixed, 0) % BOTH
    before = turn * ACROSS // BOTH
    columns = tl.maximum(mixed, 0) // BOTH * ACROSS + before
    is_column = (mixed >= 0) & ((turn + 1) * ACROSS // BOTH > before)
    if mixed >= mixed_end:
        columns = (groups - lag) * ACROSS + mixed - mixed_end
        is_column = True
    return columns, is_column


@triton.jit
def prefetch_rows(ptr, row, rows, stride, D: tl.constexpr):
    """Bring rows number ``row``, [ROWS], into the L2 cache, to be read sooner."""
    if ptr is not None and not INTERPRETED:
        LINE: tl.constexpr = 128 * 8 // ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = triton.next_power_of_2((D + LINE - 1) // LINE)
        element = tl.minimum(tl.arange(0, LINES) * LINE, D - 1)[None, :]
        # Beyond the end it is the last one, which needs no mask.
        offset = tl.minimum(row, rows - 1)[:, None] * stride
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(ptr + offset + element).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def cast_operand_columns(
    x_ptr, residual_ptr, weight_ptr, words_ptr, values_ptr, scales_ptr, seed_ptr, key_low,
    key_high, signs_low, signs_high, row, column, rows, x_stride, residual_stride,
    D: tl.constexpr, NORM_DTYPE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr, TOTAL_DTYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, MODE: tl.constexpr, ELEM_DTYPE: tl.constexpr, BITS: tl.constexpr,
    MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, MAX_MANTISSA: tl.constexpr,
    CONVERTS: tl.constexpr, G: tl.constexpr, SIGNS: tl.constexpr, STOCHASTIC: tl.constexpr,
    HEADROOM: tl.constexpr, SQUARE: tl.constexpr, MATMUL: tl.constexpr, USE: tl.constexpr,
):  # fmt: skip
    """:func:`cast_columns` of an operand that is transformed, or rounded at random."""
    seed = tl.zeros([], tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    matrix = None
    if G > 0:
        of_signs = plus(seed, signs_low, signs_high)
        matrix = hadamard_matrix(of_signs, MATMUL, SIGNS, G, OUT_DTYPE)
    y = normalized_tile(
        x_ptr, residual_ptr, weight_ptr, words_ptr, row, column, rows, x_stride, residual_stride,
        D, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE, TOTAL_DTYPE, R, C,
    )  # fmt: skip
    cast_tile(
        tl.trans(y), matrix, plus(seed, key_low, key_high), None, values_ptr, scales_ptr, None,
        column, row, D, rows, C, R, BLOCK, MODE, ELEM_DTYPE, BITS, MAX_EXPONENT, MANTISSA_BITS,
        MAX_MANTISSA, CONVERTS, G, STOCHASTIC, HEADROOM, SQUARE, MATMUL, USE,
    )  # fmt: skip


@triton.jit
def cast_columns(
    x_ptr, residual_ptr, weight_ptr, tensor_scale_ptr, words_ptr, values_ptr, scales_ptr, row,
    column, row_blocks, x_stride, residual_stride, D: tl.constexpr, BLOCK: tl.constexpr,
    MODE: tl.constexpr, ELEM_DTYPE: tl.constexpr, BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, MAX_MANTISSA: tl.constexpr, CONVERTS: tl.constexpr,
    NORM_DTYPE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr,
    TOTAL_DTYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Cast the tile [R, C] that begins at (row, column) along T, and store it transposed."""
    rows = row_blocks * BLOCK
    y = normalized_tile(
        x_ptr, residual_ptr, weight_ptr, words_ptr, row, column, rows, x_stride, residual_stride,
        D, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE, TOTAL_DTYPE, R, C,
    )  # fmt: skip
    r = tl.arange(0, R)[None, :]
    at = column.to(tl.int64) * rows + row + (tl.arange(0, C)[:, None] * rows + r)
    y = tl.trans(y)
    if not INTERPRETED:
        # Loads nothing, but gives y the layout of the store: here, as bfloat16, y is cheaper to
        # lay out than after the cast, and its blocks are within two lanes.
        like_values = values_ptr.to(tl.pointer_type(OUT_DTYPE), bitcast=True)
        y = tl.load(like_values + at, row_blocks < 0, y)
    y = tl.reshape(y, [C, R // BLOCK, BLOCK])
    tensor_scale = None
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
    scale, factor = scale_blocks(
        absmax_bits(y, 2), tensor_scale, MODE, MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA
    )
    LARGEST: tl.constexpr = (1 + MAX_MANTISSA / 8388608) * (1 << MAX_EXPONENT)
    values = to_elements(y, factor, MODE, ELEM_DTYPE, BITS, MANTISSA_BITS, LARGEST, CONVERTS)
    KEEP: tl.constexpr = "evict_first"
    if BITS == 4:
        lay_out_as_bytes(values_ptr, at, row_blocks < 0)
        values, words = tl.reshape(values, [C, R // 8]), words_of(R)[None, :]
        store_columns(values_ptr, values, words, row // 8, column, rows // 8, D, KEEP)
    else:
        store_columns(values_ptr, tl.reshape(values, [C, R]), r, row, column, rows, D, KEEP)
    b = tl.arange(0, R // BLOCK)[None, :]
    store_columns(scales_ptr, scale.to(tl.uint8), b, row // BLOCK, column, row_blocks, D, "")


@triton.jit
def store_columns(ptr, tile, r, row, column, rows, D: tl.constexpr, KEEP: tl.constexpr):
    """Store [C, R] at (column, row) of a matrix [D, rows]; ``r`` counts along R."""
    c = tl.arange(0, tile.shape[0])[:, None]
    ptr = ptr.to(tl.pointer_type(tile.dtype), bitcast=True)
    ptr += column.to(tl.int64) * rows + row
    inside = (column + c < D) & (row + r < rows)
    tl.store(ptr + (c * rows + r), tile, inside, eviction_policy=KEEP)


@triton.jit
def normalized_tile(
    x_ptr, residual_ptr, weight_ptr, words_ptr, row, column, rows, x_stride, residual_stride,
    D: tl.constexpr, NORM_DTYPE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr, TOTAL_DTYPE: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The norm's [R, C] at (row, column) in ``OUT_DTYPE``, once rho is there; zero outside."""
    r, c = tl.arange(0, R), tl.arange(0, C)[None, :]
    in_row, in_column = row + r < rows, column + c < D
    inside = in_row[:, None] & in_column
    # Asked for before rho is there.
    x_ptr += row.to(tl.int64) * x_stride + column + (r[:, None] * x_stride + c)
    x = tl.load(x_ptr, inside, 0.0, eviction_policy="evict_first")
    if residual_ptr is not None:
        residual_ptr += row.to(tl.int64) * residual_stride + column
        residual = tl.load(residual_ptr + (r[:, None] * residual_stride + c), inside, 0.0)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + column + c, in_column, 0.0)
    rho = wait_for(words_ptr + row + r, in_row)[:, None]
    if residual_ptr is not None:
        x = narrow(widen(x) + widen(residual), TOTAL_DTYPE)
    y = narrow(widen(x) * rho, NORM_DTYPE)
    if weight_ptr is not None:
        y = multiply(y, gain, PRODUCT_DTYPE)
    return convert(y, OUT_DTYPE)


_HEIGHT = 128


@dataclass(frozen=True)
class Tiling:
    """How a call is cut into programs.

    Attributes:
        rows: the row programs'; their warps are everybody's.
        height, columns: of a column program's tile, powers of two; at least 128 and 32.
        lag: groups of ``height`` rows between the cast along D and the cast along T, at least 1.
            As many must stay in the L2 cache.
        ahead: rows between a row program's and those that it asks the L2 cache for; 0: none.
    """

    rows: RowTiling
    columns: int
    lag: int
    height: int = _HEIGHT
    ahead: int = 0


# What of x and of the residual is to wait in the L2 cache: with less, programs wait for rho; with
# more, rows are read from DRAM again.
_WAITING_BYTES = 2**23
# What of them to ask the L2 cache for in advance. The requests of narrow rows cost more than they
# save.
_AHEAD_BYTES = 2**21
_AHEAD_FROM = 8192


def configuration(width: int, row_bytes: int) -> Tiling:
    """For rows of ``width`` elements, whatever their number.

    Args:
        row_bytes: of a row of x, and of the residual's, if there is one.
    """
    # Not ``row_config``'s: the warps cast the small tiles of columns, too.
    rows = RowTiling(
        max(1, 4096 // triton.next_power_of_2(width)), row_config(width).chunks, warps=4
    )
    return Tiling(
        rows,
        columns=64 if width <= 8192 else 128,
        lag=max(1, round(_WAITING_BYTES / (_HEIGHT * row_bytes))),
        ahead=_AHEAD_BYTES // row_bytes if width >= _AHEAD_FROM else 0,
    )


def norm_cast_both(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    spec: NormCastSpec,
    gain_in_rows: bool,
    *,
    tensor_scale: Tensor | None = None,
    residual: Tensor | None = None,
    config: Tiling | None = None,
    dequantize: torch.dtype | None = None,
    along_t: OperandRead | None = None,
) -> tuple[Tensor, ...]:
    """``functional.mxnorm_cast_both`` as one kernel.

    Args:
        x: [..., D], float32, bfloat16 or float16; T, the product of the leading dimensions, and D
            divisible by the block size, T not 0. ``coverage.uncovered_both`` says what else.
        tensor_scale: see :func:`norm_cast`.
        residual: of x's shape; it is added to x before the norm.
        dequantize: return values * scales in this dtype in the place of values and scales.
        along_t: the cast along T, where it is not that along D; of a format without a tensor
            scale.

    Returns:
        total where there is a residual; values and scales, or what they make dequantised; rho,
        values_t, scales_t.
    """
    width = x.shape[-1]
    read = [x] if residual is None else [x, residual]
    config = config or configuration(width, width * sum(t.element_size() for t in read))
    rows = Rows.of(x, weight, block_weights, tensor_scale, spec, residual, dequantize)
    fmt, shape_t = along_t.format if along_t else spec.format, (width, rows.count)
    values_t = x.new_empty(fmt.values_shape(shape_t), dtype=fmt.elem_dtype)
    scales_t = x.new_empty(fmt.scales_shape(shape_t), dtype=torch.uint8)
    groups = (rows.count + config.height - 1) // config.height
    programs = config.height // config.rows.rows + (width + config.columns - 1) // config.columns
    launch.launcher(norm_cast_both_kernel)[(groups * programs,)](
        *rows.pointers,
        values_t,
        scales_t,
        x.new_zeros((groups * config.height,), dtype=torch.int32),
        rows.count // spec.format.block_size,
        *rows.strides,
        None if along_t is None else along_t.seed,
        *key_halves(along_t),
        **rows.constants,
        GAIN_IN_ROWS=gain_in_rows,
        ROWS=config.rows.rows,
        TILE_K=tile_blocks(width, spec, config.rows),
        CHUNKS=config.rows.chunks,
        R=config.height,
        C=config.columns,
        LAG=config.lag,
        AHEAD=config.ahead,
        **operand_constants(x, along_t, "_T"),
        num_warps=config.rows.warps,
    )
    return *rows.results, values_t, scales_t.view(fmt.scale_dtype)
