"""Casts of a matrix along its rows and along its columns, in one pass over memory.

Of two matmuls of a backward that read one gradient, each contracts another of its dimensions. A
program reads tiles of S x S elements and casts each along either dimension, or along both: it
transforms by a product with a Hadamard matrix, finds the blocks' scales and rounds, to nearest or
by random numbers of its own making.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.device.hadamard import hadamard_matrix
from mxnorm_pass.kernels.device.operand import cast_tile, plus
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.kernels.operands import (
    key_halves,
    operand_constants,
    operand_results,
    typed_results,
)
from mxnorm_pass.kernels.rows import as_rows


@triton.jit
def operand_casts_kernel(
    x_ptr, seed_ptr, rows, columns, x_stride,
    key_low, key_high, signs_low, signs_high, tensor_scale_ptr, values_ptr, scales_ptr,
    dequantized_ptr, key_t_low, key_t_high, signs_t_low, signs_t_high, tensor_scale_t_ptr,
    values_t_ptr, scales_t_ptr, dequantized_t_ptr,
    S: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, MODE: tl.constexpr, ELEM_DTYPE: tl.constexpr, BITS: tl.constexpr,
    MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, MAX_MANTISSA: tl.constexpr,
    CONVERTS: tl.constexpr, G: tl.constexpr, SIGNS: tl.constexpr, STOCHASTIC: tl.constexpr,
    HEADROOM: tl.constexpr, SQUARE: tl.constexpr, MATMUL: tl.constexpr, USE: tl.constexpr,
    BLOCK_T: tl.constexpr, MODE_T: tl.constexpr, ELEM_DTYPE_T: tl.constexpr, BITS_T: tl.constexpr,
    MAX_EXPONENT_T: tl.constexpr, MANTISSA_BITS_T: tl.constexpr, MAX_MANTISSA_T: tl.constexpr,
    CONVERTS_T: tl.constexpr, G_T: tl.constexpr, SIGNS_T: tl.constexpr,
    STOCHASTIC_T: tl.constexpr, HEADROOM_T: tl.constexpr, SQUARE_T: tl.constexpr,
    MATMUL_T: tl.constexpr, USE_T: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of ``TILES * S`` columns, tiles of S rows.

    Args:
        key_low, key_high: halves of what is added to the seed for the numbers of roundings.
        signs_low, signs_high: of what is added to it for those of signs.
        BLOCK, ...: of the cast along the rows; 0: there is none. Those with _T are of the cast of
            the transpose, whose results are transposed.
        G: of the Hadamard transform; 0: none.
    """
    row = tl.program_id(1) * S
    seed = tl.zeros([], tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    matrix, matrix_t = None, None
    if G > 0:
        matrix = hadamard_matrix(plus(seed, signs_low, signs_high), MATMUL, SIGNS, G, dtype)
    if G_T > 0:
        seed_t = plus(seed, signs_t_low, signs_t_high)
        matrix_t = hadamard_matrix(seed_t, MATMUL_T, SIGNS_T, G_T, dtype)
    r = (row + tl.arange(0, S))[:, None]
    for tile in range(TILES):
        column = (tl.program_id(0) * TILES + tile) * S
        c = (column + tl.arange(0, S))[None, :]
        x = tl.load(x_ptr + r.to(tl.int64) * x_stride + c, (r < rows) & (c < columns), 0.0)
        if BLOCK > 0:
            cast_tile(
                x, matrix, plus(seed, key_low, key_high), tensor_scale_ptr, values_ptr, scales_ptr,
                dequantized_ptr, row, column, rows, columns, S, S, BLOCK, MODE, ELEM_DTYPE, BITS,
                MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA, CONVERTS, G, STOCHASTIC, HEADROOM,
                SQUARE, MATMUL, USE,
            )  # fmt: skip
        if BLOCK_T > 0:
            cast_tile(
                tl.trans(x), matrix_t, plus(seed, key_t_low, key_t_high), tensor_scale_t_ptr,
                values_t_ptr, scales_t_ptr, dequantized_t_ptr, column, row, columns, rows, S, S,
                BLOCK_T, MODE_T, ELEM_DTYPE_T, BITS_T, MAX_EXPONENT_T, MANTISSA_BITS_T,
                MAX_MANTISSA_T, CONVERTS_T, G_T, STOCHASTIC_T, HEADROOM_T, SQUARE_T, MATMUL_T,
                USE_T,
            )  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """How a call is cut into programs.

    Attributes:
        size: of square tiles; a power of two, a multiple of blocks and of the transform's pieces.
        tiles: next to each other in a program.
        warps: per program.
    """

    size: int
    tiles: int
    warps: int


def configuration(reads: tuple[OperandRead, ...]) -> Tiling:
    """For any shape."""
    sizes = [read.hadamard_size for read in reads]
    sizes += [read.operand.cast.block_size for read in reads]
    size = max(64, *sizes)
    # A matrix to transform by is made once for all tiles of a program.
    tiles = 8 if any(read.hadamard_size for read in reads) else 2
    return Tiling(size, tiles, warps=4 if size == 64 else 8)


def operand_casts(
    x: Tensor,
    along_rows: OperandRead | None,
    along_columns: OperandRead | None,
    *,
    config: Tiling | None = None,
) -> tuple[Tensor, ...]:
    """``functional.cast_operand`` of x and of its transpose, as one kernel.

    Elements are those of ``functional`` but where a sum of the transform, taken in another order,
    is rounded otherwise.

    Args:
        x: [R, C], float32, bfloat16 or float16.
        along_rows: blocks, and the transform's pieces, divide C; or None.
        along_columns: they divide R; or None.

    Returns:
        Of each that is given values and scales, or what they make dequantised; along columns of
        the transpose, [C, R].
    """
    x = as_rows(x)
    given = tuple(read for read in (along_rows, along_columns) if read is not None)
    config = config or configuration(given)
    rows, columns = x.shape
    of_rows = operand_results(x, (rows, columns), along_rows)
    of_columns = operand_results(x, (columns, rows), along_columns)
    seeds = [read.seed for read in given if read.seed is not None]
    across = (columns + config.size * config.tiles - 1) // (config.size * config.tiles)
    launch.launcher(operand_casts_kernel)[(across, (rows + config.size - 1) // config.size)](
        x,
        seeds[0] if seeds else None,
        rows,
        columns,
        x.stride(0),
        *key_halves(along_rows),
        None if along_rows is None else along_rows.tensor_scale,
        *of_rows,
        *key_halves(along_columns),
        None if along_columns is None else along_columns.tensor_scale,
        *of_columns,
        S=config.size,
        TILES=config.tiles,
        **operand_constants(x, along_rows, ""),
        **operand_constants(x, along_columns, "_T"),
        num_warps=config.warps,
    )
    return *typed_results(along_rows, of_rows), *typed_results(along_columns, of_columns)
