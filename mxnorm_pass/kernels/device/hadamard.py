"""Device functions: the Hadamard transform of ``numerics.hadamard``, as a product of matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.noise import random_signs
from mxnorm_pass.kernels.device.rounding import INTERPRETED, widen
from mxnorm_pass.numerics.hadamard import FIXED_COUNT, FIXED_SIGNS

_FIXED_SIGNS = tl.constexpr(FIXED_SIGNS)
_FIXED_COUNT = tl.constexpr(FIXED_COUNT)


@triton.jit
def transform(x, matrix, G: tl.constexpr):
    """``x`` [M, S] times ``matrix``, float32: exact products, summed up in any order."""
    if INTERPRETED:
        product = tl.dot(widen(x), widen(matrix))
    else:
        product = tl.dot(x, matrix, input_precision="ieee")
    return product * (1.0 / G**0.5)


@triton.jit
def hadamard_matrix(
    seed,
    MATMUL: tl.constexpr,
    SIGNS: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    dtype: tl.constexpr,
):
    """diag(signs) H for each piece of G elements of S, as one matrix [S, S] of 1, -1 and 0.

    Args:
        seed: int64, of random signs.
        G: a power of two, at most 128.
    """
    i = tl.arange(0, S)
    if SIGNS == "random":
        negative = random_signs(seed, MATMUL, i % G)
    elif SIGNS == "fixed":
        negative = (_FIXED_SIGNS >> (i % _FIXED_COUNT)) & 1
    else:
        negative = tl.zeros_like(i)
    i, j = i[:, None], tl.arange(0, S)[None, :]
    # Sylvester's H is -1 where i and j have an odd number of bits in common.
    parity = i & j & (G - 1)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    sign = 1 - 2 * ((parity ^ negative[:, None]) & 1)
    return tl.where(i // G == j // G, sign, 0).to(tl.float32).to(dtype)
