"""Device functions: random numbers that depend on seed and position alone (``numerics.philox``)."""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.numerics.philox import ROUNDS, Use

_ROUNDS = tl.constexpr(ROUNDS)
_SIGNS = tl.constexpr(int(Use.SIGNS))
_EIGHT = tl.constexpr(8)


@triton.jit
def noise_of(
    seed,
    USE: tl.constexpr,
    MATMUL: tl.constexpr,
    row,
    first,
    WIDTH: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
):
    """What is added to elements before they are rounded down, in powers of two of their own.

    Of the number n at (row, column) it is, in steps between elements, 1 - (n + 1/2) / 2^16: a
    fraction that is at least the rest, as ``stochastic.round_stochastically`` asks, is rounded up.

    Args:
        seed: int64.
        row: [M] of the operand, whose contraction is last.
        first: column of the operand; a multiple of 8, as is ``WIDTH``.
        MANTISSA_BITS: a step is 2^-MANTISSA_BITS times the element's power of two.

    Returns:
        [M, WIDTH], float32.
    """
    M: tl.constexpr = row.shape[0]
    zeros = tl.zeros([M, WIDTH // _EIGHT], tl.int32)
    octet = first // _EIGHT + tl.arange(0, WIDTH // _EIGHT)[None, :] + zeros
    words = tl.philox(seed, zeros + USE, octet, zeros + MATMUL, row[:, None] + zeros, _ROUNDS)
    pairs = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    pairs = tl.reshape(pairs, [M, WIDTH // 2])
    # The mantissa of a float32 from one power of two to the next: n's complement, and a half.
    POWER: tl.constexpr = (127 - MANTISSA_BITS) << 23
    low = ((pairs << 7) & 0x7FFF80) ^ (POWER | 0x7FFFC0)
    high = ((pairs >> 9) & 0x7FFF80) ^ (POWER | 0x7FFFC0)
    bits = tl.reshape(tl.join(low, high), [M, WIDTH])
    return bits.to(tl.float32, bitcast=True) - 2.0**-MANTISSA_BITS


@triton.jit
def random_signs(seed, MATMUL: tl.constexpr, at):
    """1 where sign number ``at`` is negative, else 0: int32 of its shape."""
    zeros = tl.zeros_like(at)
    words = tl.philox(seed, zeros + _SIGNS, at // _EIGHT, zeros + MATMUL, zeros, _ROUNDS)
    pair = at % _EIGHT // 2
    word = tl.where(pair < 2, tl.where(pair == 0, words[0], words[1]), words[3])
    word = tl.where(pair == 2, words[2], word)
    return ((word >> (15 + at % 2 * 16).to(tl.uint32)) & 1).to(tl.int32)
