"""Device functions: an operand's tile in a format, transformed and rounded as its recipe says."""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.cast import dequantize, scale_blocks
from mxnorm_pass.kernels.device.elements import to_elements
from mxnorm_pass.kernels.device.hadamard import transform
from mxnorm_pass.kernels.device.mx import absmax_bits
from mxnorm_pass.kernels.device.noise import noise_of


@triton.jit
def plus(seed, low, high):
    """The seed and a key of 64 bits, which Inductor (torch 2.11) passes in no single argument."""
    zero = tl.zeros([], tl.int64)
    return seed + (((zero + high) << 32) | ((zero + low) & 0xFFFFFFFF))


@triton.jit
def cast_tile(
    x, matrix, seed, tensor_scale_ptr, values_ptr, scales_ptr, dequantized_ptr, row, column, rows,
    columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    ELEM_DTYPE: tl.constexpr, BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, MAX_MANTISSA: tl.constexpr, CONVERTS: tl.constexpr,
    G: tl.constexpr, STOCHASTIC: tl.constexpr, HEADROOM: tl.constexpr, SQUARE: tl.constexpr,
    MATMUL: tl.constexpr, USE: tl.constexpr,
):  # fmt: skip
    """Cast ``x`` [HEIGHT, WIDTH], at (row, column) of an operand [rows, columns], along its rows.

    What lies outside is 0. Columns are a multiple of the blocks and of the transform's pieces.
    """
    K: tl.constexpr = WIDTH // BLOCK
    y = x
    # Where 1 / sqrt G is a power of two it goes into the scales.
    LEFT: tl.constexpr = G**-0.5 if G == 4 or G == 16 or G == 64 else 1.0
    if G > 0:
        y = transform(x, matrix, G**-0.5 / LEFT)
    y = tl.reshape(y, [HEIGHT, K, BLOCK])
    absmax = absmax_bits(y, 2)
    if LEFT != 1.0:
        absmax = (absmax.to(tl.float32, bitcast=True) * LEFT).to(tl.int32, bitcast=True)
    if SQUARE:
        DOWN: tl.constexpr = HEIGHT // BLOCK
        of_squares = tl.max(tl.reshape(absmax, [DOWN, BLOCK, K]), 1)
        absmax = tl.broadcast_to(tl.expand_dims(of_squares, 1), [DOWN, BLOCK, K])
        absmax = tl.reshape(absmax, [HEIGHT, K])
    tensor_scale = None
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
    scale, factor = scale_blocks(
        absmax, tensor_scale, MODE, MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA
    )
    # Both are exact: scales of the formats that need headroom are powers of two.
    factor *= LEFT * HEADROOM
    r = row + tl.arange(0, HEIGHT)
    noise = None
    if STOCHASTIC:
        noise = noise_of(seed, USE, MATMUL, r, column, WIDTH, MANTISSA_BITS)
        noise = tl.reshape(noise, [HEIGHT, K, BLOCK])
    LARGEST: tl.constexpr = (1 + MAX_MANTISSA / 8388608) * (1 << MAX_EXPONENT)
    if values_ptr is not None:
        values = to_elements(
            y, factor, MODE, ELEM_DTYPE, BITS, MANTISSA_BITS, LARGEST, CONVERTS, noise
        )
        if BITS == 4:
            words_ptr = values_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
            store_tile(words_ptr, values, row, column // 8, rows, columns // 8, HEIGHT, WIDTH // 8)
        else:
            store_tile(values_ptr, values, row, column, rows, columns, HEIGHT, WIDTH)
    if scales_ptr is not None:
        scale = scale.to(tl.uint8)
        store_tile(scales_ptr, scale, row, column // BLOCK, rows, columns // BLOCK, HEIGHT, K)
    if dequantized_ptr is not None:
        wide: tl.constexpr = dequantized_ptr.dtype.element_ty
        restored = dequantize(
            y, factor, scale, tensor_scale, wide, MODE, ELEM_DTYPE, BITS, MANTISSA_BITS, LARGEST,
            noise,
        )  # fmt: skip
        store_tile(dequantized_ptr, restored, row, column, rows, columns, HEIGHT, WIDTH)


@triton.jit
def store_tile(
    ptr, tile, row, column, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    r = (row + tl.arange(0, HEIGHT))[:, None]
    c = (column + tl.arange(0, WIDTH))[None, :]
    tile = tl.reshape(tile, [HEIGHT, WIDTH])
    tl.store(ptr + r.to(tl.int64) * columns + c, tile, (r < rows) & (c < columns))
