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
def transform(x, matrix, SCALE: tl.constexpr):
    """``x`` [M, W], each piece of P of a row times ``matrix`` [P, P] and SCALE, float32.

    Products are exact, and summed up in any order.
    """
    P: tl.constexpr = matrix.shape[0]
    pieces = tl.reshape(x, [x.shape[0] * x.shape[1] // P, P])
    if INTERPRETED:
        product = tl.dot(widen(pieces), widen(matrix))
    else:
        product = tl.dot(pieces, matrix, input_precision="ieee")
    if SCALE != 1.0:
        product *= SCALE
    return tl.reshape(product, x.shape)


@triton.jit
def hadamard_matrix(
    seed,
    MATMUL: tl.constexpr,
    SIGNS: tl.constexpr,
    G: tl.constexpr,
    dtype: tl.constexpr,
):
    """diag(signs) H of G elements, or for each G of the 16 that are the fewest to multiply.

    Args:
        seed: int64, of random signs.
        G: a power of two, at most 128.

    Returns:
        [P, P] of 1, -1 and, between pieces, 0.
    """
    P: tl.constexpr = max(G, 16)
    i = tl.arange(0, P)
    if SIGNS == "random":
        negative = random_signs(seed, MATMUL, i % G)
    elif SIGNS == "fixed":
        negative = (_FIXED_SIGNS >> (i % _FIXED_COUNT)) & 1
    else:
        negative = tl.zeros_like(i)
    i, j = i[:, None], tl.arange(0, P)[None, :]
    # Sylvester's H is -1 where i and j have an odd number of bits in common.
    parity = i & j & (G - 1)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    sign = tl.where(((parity ^ negative[:, None]) & 1) == 0, 1.0, -1.0)
    return tl.where(i // G == j // G, sign, 0.0).to(dtype)
