"""Device functions: absmaxes of blocks and their E8M0 scales, on float32 bit patterns.

A non-negative float32 and its bits order alike, and NaN lies above infinity, so the largest bits
of a block are its absmax with NaN propagated, and integers are all that a scale needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.rounding import INTERPRETED, widen

INFINITY = tl.constexpr(0x7F800000)
MANTISSA = tl.constexpr(0x7FFFFF)


@triton.jit
def absmax_bits(x, axis: tl.constexpr):
    """Bits, of float32, of the largest |x| along ``axis``; those of a NaN if there is one."""
    if INTERPRETED:
        return tl.max(widen(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)
    else:
        # One instruction an element where bits take two; half of one in bfloat16.
        return widen(tl.reduce(tl.abs(x), axis, _maximum)).to(tl.int32, bitcast=True)


@triton.jit
def _maximum(a, b):
    # Triton takes bfloat16's maximum in float32; compilers undo it.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)


@triton.jit
def e8m0_exponent(
    absmax,
    mode: tl.constexpr,
    max_exponent: tl.constexpr,
    mantissa_bits: tl.constexpr,
    max_mantissa: tl.constexpr,
):
    """Biased exponent, int32, of the scale of blocks whose absmax has the bits ``absmax``.

    ``e8m0.e8m0_exponent`` bit for bit. The largest element has the mantissa bits ``max_mantissa``
    in float32, below 2 ** (max_exponent + 1).
    """
    exponent = (absmax >> 23) - max_exponent
    if mode == "rceil":
        # No finite absmax reaches 254.
        exponent = tl.maximum(((absmax + (MANTISSA - max_mantissa)) >> 23) - max_exponent, 0)
        return tl.where(absmax >= INFINITY, 254 + (absmax > INFINITY).to(tl.int32), exponent)
    elif mode == "ceil":
        exponent += ((absmax & MANTISSA) > 0).to(tl.int32)
    elif mode == "even":
        exponent = ((absmax + (1 << (22 - mantissa_bits))) >> 23) - max_exponent
    else:
        tl.static_assert(mode == "floor", "scale_mode: rceil, ceil, even or floor")
    return tl.where(absmax > INFINITY, 255, tl.maximum(exponent, 0))


@triton.jit
def e8m0_reciprocal(exponent, mode: tl.constexpr):
    """What elements are multiplied by, float32: ``cast.divide`` bit for bit."""
    if mode == "rceil":
        bits = (254 << 23) - exponent * (1 << 23)
        bits = tl.where(exponent == 0, 127 << 23, bits)
        bits = tl.where(exponent >= 254, tl.where(exponent == 254, 1 << 22, 0x7FC00000), bits)
    else:
        # Dividing by a power of two is multiplying by its inverse; a NaN's pattern is infinity.
        bits = (254 - tl.maximum(exponent, 1)) << 23
        bits = tl.where(exponent == 255, 0, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(exponent):
    """2^(exponent - 127), float32; NaN for 255 (``e8m0.e8m0_to_float``)."""
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def blocked_scale_offset(row, block, tiles_across):
    """Where the 128x4 layout of ``layout.blocked_scales`` has the scale of (row, block)."""
    tile = (row // 128) * tiles_across + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
