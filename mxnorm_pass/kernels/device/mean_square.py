"""Device functions: the (estimated) inverse RMS of rows, and rows times it.

What ``rms`` and ``norm.normalize`` of ``numerics`` compute, on tiles [ROWS, K, B] in registers. The
exact RMS is the same sum with p = 2, over elements instead of block absmaxes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.mx import absmax_bits
from mxnorm_pass.kernels.device.rounding import round_to


@triton.jit
def accumulate(x, block_weights, partial, largest, EXACT: tl.constexpr, P: tl.constexpr):
    """Add a tile to its rows' sums: of x^2, or of w_k m_k^p over its blocks.

    For p other than 1 and 2 the sums are of (m_k / largest)^p: m_k^p leaves float32's range. The
    weights' roots are then in m_k: a block that has no weight may be the largest by far.

    Args:
        block_weights: [K] or None.
        partial, largest: [ROWS], the sums and the largest finite m_k so far.
    """
    if EXACT:
        return partial + tl.sum(tl.sum(x * x, 2), 1), largest
    m = absmax_bits(x, 2).to(tl.float32, bitcast=True)
    if P == 2.0:
        powers = weighted(m * m, block_weights)
    elif P == 1.0:
        powers = weighted(m, block_weights)
    else:
        if block_weights is not None:
            m = weighted(m, power(block_weights, 1.0 / P))
        before = largest
        largest = tl.maximum(largest, tl.max(tl.where(m < float("inf"), m, 0.0), 1))
        unit = divisor(largest)
        # An infinite sum stays so, even where the ratio's power is 0.
        scales = (before > 0) & (partial < float("inf"))
        partial = tl.where(scales, partial * power(before / unit, P), partial)
        powers = power(m / unit[:, None], P)
    return partial + tl.sum(powers, 1), largest


@triton.jit
def weighted(powers, block_weights):
    return powers if block_weights is None else powers * block_weights[None, :]


@triton.jit
def inverse_rms(
    partial,
    largest,
    EPS: tl.constexpr,
    P: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
):
    """rho [ROWS] of the sums that :func:`accumulate` made.

    Args:
        FACTOR: what the sum is multiplied by: 1 / (K c^p), 1 / D for the exact RMS; 1 with block
            weights. For p other than 1 and 2 c is left to ``SCALE``.
        SCALE: 1 / c for these p.
    """
    mean_square = partial * FACTOR
    if P == 1.0:
        mean_square = mean_square * mean_square
    elif P != 2.0:
        root = divisor(largest) * power(mean_square, 1.0 / P) * SCALE
        mean_square = root * root
    # The approximate rsqrt would take subnormals for zero.
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + EPS))


@triton.jit
def power(x, p: tl.constexpr):
    """x^p for x >= 0 or NaN, by base-2 logarithm."""
    return tl.where(x > 0, tl.exp2(tl.log2(x) * p), x)


@triton.jit
def divisor(largest):
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def normalize(
    x,
    rho,
    weight,
    NORM_DTYPE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
):
    """x * rho * weight, rounded after each factor and to ``OUT_DTYPE``; stays float32."""
    y = round_to(x * rho, NORM_DTYPE)
    if weight is not None:
        y = round_to(y * weight, PRODUCT_DTYPE)
    return round_to(y, OUT_DTYPE)
