"""Casts of a matrix along its rows and along its columns, in one pass over memory.

Of two matmuls of a backward that read one gradient, each contracts another of its dimensions. A
program reads tiles of S x S elements and casts each along either dimension, or along both: it
transforms by a product with a Hadamard matrix, finds the blocks' scales and rounds, to nearest or
by random numbers of its own making.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.device.cast import dequantize, scale_blocks
from mxnorm_pass.kernels.device.elements import to_elements
from mxnorm_pass.kernels.device.hadamard import hadamard_matrix, transform
from mxnorm_pass.kernels.device.mx import absmax_bits
from mxnorm_pass.kernels.device.noise import noise_of
from mxnorm_pass.kernels.rows import as_rows, element_constants
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import matmul_number


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
        matrix = hadamard_matrix(plus(seed, signs_low, signs_high), MATMUL, SIGNS, G, S, dtype)
    if G_T > 0:
        seed_t = plus(seed, signs_t_low, signs_t_high)
        matrix_t = hadamard_matrix(seed_t, MATMUL_T, SIGNS_T, G_T, S, dtype)
    r = (row + tl.arange(0, S))[:, None]
    for tile in range(TILES):
        column = (tl.program_id(0) * TILES + tile) * S
        c = (column + tl.arange(0, S))[None, :]
        x = tl.load(x_ptr + r.to(tl.int64) * x_stride + c, (r < rows) & (c < columns), 0.0)
        if BLOCK > 0:
            cast_tile(
                x, matrix, plus(seed, key_low, key_high), tensor_scale_ptr, values_ptr, scales_ptr,
                dequantized_ptr, row, column, rows, columns, S, BLOCK, MODE, ELEM_DTYPE, BITS,
                MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA, CONVERTS, G, STOCHASTIC, HEADROOM,
                SQUARE, MATMUL, USE,
            )  # fmt: skip
        if BLOCK_T > 0:
            cast_tile(
                tl.trans(x), matrix_t, plus(seed, key_t_low, key_t_high), tensor_scale_t_ptr,
                values_t_ptr, scales_t_ptr, dequantized_t_ptr, column, row, columns, rows, S,
                BLOCK_T, MODE_T, ELEM_DTYPE_T, BITS_T, MAX_EXPONENT_T, MANTISSA_BITS_T,
                MAX_MANTISSA_T, CONVERTS_T, G_T, STOCHASTIC_T, HEADROOM_T, SQUARE_T, MATMUL_T,
                USE_T,
            )  # fmt: skip


@triton.jit
def plus(seed, low, high):
    """The seed and a key of 64 bits, which Inductor (torch 2.11) passes in no single argument."""
    zero = tl.zeros([], tl.int64)
    return seed + (((zero + high) << 32) | ((zero + low) & 0xFFFFFFFF))


@triton.jit
def cast_tile(
    x, matrix, seed, tensor_scale_ptr, values_ptr, scales_ptr, dequantized_ptr, row, column, rows,
    columns, S: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, ELEM_DTYPE: tl.constexpr,
    BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    MAX_MANTISSA: tl.constexpr, CONVERTS: tl.constexpr, G: tl.constexpr,
    STOCHASTIC: tl.constexpr, HEADROOM: tl.constexpr, SQUARE: tl.constexpr, MATMUL: tl.constexpr,
    USE: tl.constexpr,
):  # fmt: skip
    """Cast ``x`` [S, S], at (row, column) of an operand [rows, columns], along its last dimension.

    What lies outside is 0. Columns are a multiple of the blocks and of the transform's pieces.
    """
    K: tl.constexpr = S // BLOCK
    y = x
    if G > 0:
        y = transform(x, matrix, G)
    y = tl.reshape(y, [S, K, BLOCK])
    absmax = absmax_bits(y, 2)
    if SQUARE:
        of_squares = tl.max(tl.reshape(absmax, [K, BLOCK, K]), 1)
        absmax = tl.broadcast_to(tl.expand_dims(of_squares, 1), [K, BLOCK, K])
        absmax = tl.reshape(absmax, [S, K])
    tensor_scale = None
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
    scale, factor = scale_blocks(
        absmax, tensor_scale, MODE, MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA
    )
    r = row + tl.arange(0, S)
    noise = None
    if STOCHASTIC:
        noise = tl.reshape(noise_of(seed, USE, MATMUL, r, column, S), [S, K, BLOCK])
    LARGEST: tl.constexpr = (1 + MAX_MANTISSA / 8388608) * (1 << MAX_EXPONENT)
    if values_ptr is not None:
        values = to_elements(
            y, factor, MODE, ELEM_DTYPE, BITS, MANTISSA_BITS, LARGEST, CONVERTS, noise, HEADROOM
        )
        if BITS == 4:
            words_ptr = values_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
            store_tile(words_ptr, values, row, column // 8, rows, columns // 8, S, S // 8)
        else:
            store_tile(values_ptr, values, row, column, rows, columns, S, S)
    if scales_ptr is not None:
        scale = scale.to(tl.uint8)
        store_tile(scales_ptr, scale, row, column // BLOCK, rows, columns // BLOCK, S, K)
    if dequantized_ptr is not None:
        wide: tl.constexpr = dequantized_ptr.dtype.element_ty
        restored = dequantize(
            y, factor, scale, tensor_scale, wide, MODE, ELEM_DTYPE, BITS, MANTISSA_BITS, LARGEST,
            noise, HEADROOM,
        )  # fmt: skip
        store_tile(dequantized_ptr, restored, row, column, rows, columns, S, S)


@triton.jit
def store_tile(
    ptr, tile, row, column, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    r = (row + tl.arange(0, HEIGHT))[:, None]
    c = (column + tl.arange(0, WIDTH))[None, :]
    tile = tl.reshape(tile, [HEIGHT, WIDTH])
    tl.store(ptr + r.to(tl.int64) * columns + c, tile, (r < rows) & (c < columns))


@dataclass(frozen=True, eq=False)
class OperandRead:
    """A matrix, or its transpose, as an operand of a matmul.

    Attributes:
        operand: what becomes of it.
        seed: [] int64, of the graph; None where nothing is random.
        key, right_key: see ``ops.operands``.
        tensor_scale: [] float32, of NVFP4.
        dequantize: return what values and scales make in this dtype in their place.
    """

    operand: Operand
    seed: Tensor | None = None
    key: int = 0
    right_key: int = 0
    tensor_scale: Tensor | None = None
    dequantize: torch.dtype | None = None


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
    sizes = [_hadamard_size(read.operand) for read in reads]
    sizes += [read.operand.cast.block_size for read in reads]
    size = max(64, *sizes)
    return Tiling(size, tiles=4, warps=4 if size == 64 else 8)


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
    of_rows = _results(x, (rows, columns), along_rows)
    of_columns = _results(x, (columns, rows), along_columns)
    seeds = [read.seed for read in given if read.seed is not None]
    across = (columns + config.size * config.tiles - 1) // (config.size * config.tiles)
    launch.launcher(operand_casts_kernel)[(across, (rows + config.size - 1) // config.size)](
        x,
        seeds[0] if seeds else None,
        rows,
        columns,
        x.stride(0),
        *_arguments(along_rows, of_rows),
        *_arguments(along_columns, of_columns),
        S=config.size,
        TILES=config.tiles,
        **_constants(x, along_rows, ""),
        **_constants(x, along_columns, "_T"),
        num_warps=config.warps,
    )
    return *_typed(along_rows, of_rows), *_typed(along_columns, of_columns)


# Values, scales (bytes), dequantised; None where nobody wants it.
_Results = tuple[Tensor | None, Tensor | None, Tensor | None]


def _results(x: Tensor, shape: tuple[int, int], read: OperandRead | None) -> _Results:
    """Uninitialised."""
    if read is None:
        return None, None, None
    if read.dequantize is not None:
        return None, None, x.new_empty(shape, dtype=read.dequantize)
    fmt = read.operand.cast.format
    assert fmt is not None
    values = x.new_empty(fmt.values_shape(shape), dtype=fmt.elem_dtype)
    return values, x.new_empty(fmt.scales_shape(shape), dtype=torch.uint8), None


def _typed(read: OperandRead | None, results: _Results) -> tuple[Tensor, ...]:
    values, scales, dequantized = results
    if read is None or values is None or scales is None:
        return () if dequantized is None else (dequantized,)
    fmt = read.operand.cast.format
    assert fmt is not None
    return values, scales.view(fmt.scale_dtype)


def _arguments(read: OperandRead | None, results: _Results) -> tuple[Any, ...]:
    if read is None:
        return 0, 0, 0, 0, None, *results
    keys = (*_halves(read.key), *_halves(read.right_key))
    return *keys, read.tensor_scale, *results


def _halves(key: int) -> tuple[int, int]:
    """Signed 32-bit integers, the lower one first."""
    low = key & 0xFFFFFFFF
    return low - ((low >> 31) << 32), key >> 32


def _hadamard_size(operand: Operand) -> int:
    return 0 if operand.hadamard is None else operand.hadamard.size


def _constants(x: Tensor, read: OperandRead | None, suffix: str) -> dict[str, Any]:
    if read is None:
        return dict.fromkeys((name + suffix for name in _NAMES), 0)
    operand = read.operand
    fmt = operand.cast.format
    assert fmt is not None
    values = element_constants(fmt, x.device) | {
        "BLOCK": fmt.block_size,
        "G": _hadamard_size(operand),
        "SIGNS": "none" if operand.hadamard is None else operand.hadamard.signs,
        "STOCHASTIC": operand.cast.is_stochastic,
        "HEADROOM": operand.cast.headroom,
        "SQUARE": operand.cast.square_blocks,
        "MATMUL": matmul_number(operand.matmul),
        "USE": int(operand.use),
    }
    return {name + suffix: value for name, value in values.items()}


_NAMES = (
    "BLOCK", "MODE", "ELEM_DTYPE", "BITS", "MAX_EXPONENT", "MANTISSA_BITS", "MAX_MANTISSA",
    "CONVERTS", "G", "SIGNS", "STOCHASTIC", "HEADROOM", "SQUARE", "MATMUL", "USE",
)  # fmt: skip
