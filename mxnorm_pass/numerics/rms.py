"""The RMS of a row from the absmaxes of its blocks (McLean et al. 2026, arXiv 2603.13180).

Shapes: ``T`` rows of ``D`` elements, cut into ``K = D / block_size`` blocks of ``B`` elements.
Leading dimensions are free; blocks lie along the last one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import mpmath
import torch
from torch import Tensor

Estimator = Literal["mxnorm", "exact"]


@lru_cache(maxsize=256)
def rms_constant(p: float, block_size: int) -> float:
    """The constant c(p, B) that turns a generalised mean of block absmaxes into an RMS.

    For i.i.d. Gaussian elements G_p / RMS tends to c(p, B) almost surely as K grows, with
    c(p, B)^p = E[max_b |z_b|^p] = integral over t > 0 of p t^(p-1) (1 - erf(t / sqrt 2)^B).

    Args:
        p: exponent of the generalised mean, > 0.
        block_size: elements per block, B >= 1.

    Raises:
        ValueError: ``p`` is not a positive finite number or ``block_size`` is below 1.
    """
    if not (math.isfinite(p) and p > 0):
        raise ValueError(f"p is {p}; it must be a finite number > 0")
    check_block_size(block_size)

    def integrand(t: Any) -> Any:
        # By parts: t^p times the density of the largest |z|. It is bounded at 0 for every p.
        density = block_size * mpmath.erf(t / mpmath.sqrt(2)) ** (block_size - 1)
        return t**p * density * mpmath.sqrt(2 / mpmath.pi) * mpmath.exp(-(t**2) / 2)

    with mpmath.workdps(30):
        peak = mpmath.sqrt(max(p, 1.0))
        knots = [0, 0.5, 1, 2, 3, 4, 6, 4 + peak, 6 + peak, 8 + 2 * peak, mpmath.inf]
        moment = mpmath.quad(integrand, sorted(set(knots)))
        return float(moment ** (mpmath.mpf(1) / p))


def check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be an integer of at least 1")


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def blocks(x: Tensor, block_size: int) -> Tensor:
    check_block_size(block_size)
    if x.ndim == 0 or x.shape[-1] % block_size != 0:
        raise ValueError(
            f"the last dimension of shape {tuple(x.shape)} is not divisible by "
            f"block_size {block_size}"
        )
    return x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)


def block_absmax(x: Tensor, block_size: int) -> Tensor:
    return blocks(x, block_size).abs().amax(-1)


def _power_mean(absmax: Tensor, p: float) -> Tensor:
    """(mean of absmax^p)^(1/p), [..., K] -> [..., 1], within the range of absmax itself."""
    # m^p leaves float32's range long before m does, so take the largest block out.
    largest = absmax.amax(-1, keepdim=True).detach()
    largest = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    ratio = absmax / largest
    # The derivative of 0^p is infinite for p < 1 and would turn 0 * inf into NaN.
    powers = torch.where(ratio > 0, torch.where(ratio > 0, ratio, 1.0).pow(p), ratio)
    mean = powers.mean(-1, keepdim=True)
    root = torch.where(mean > 0, torch.where(mean > 0, mean, 1.0).pow(1 / p), mean)
    return largest * root


def _weighted_power_sum(absmax: Tensor, p: float, weights: Tensor) -> Tensor:
    """(sum of w_k absmax_k^p)^(1/p), [..., K] -> [..., 1], within the range of absmax itself."""
    heaviest = weights.amax().clamp(min=torch.finfo(weights.dtype).tiny)
    # Weights go under the power: a block that has hardly any may be the largest by far.
    relative = absmax * (weights / heaviest).pow(1 / p)
    return _power_mean(relative, p) * (heaviest * len(weights)).pow(1 / p)


def mean_square_from_absmax(
    absmax: Tensor, p: float, block_size: int, block_weights: Tensor | None = None
) -> Tensor:
    """rms~^2 from block absmaxes [..., K] -> [..., 1]; p = 2 needs no root.

    ``block_weights`` [K] stand for 1 / (K c^p): rms~^p = sum_k w_k m_k^p. A square may leave the
    dtype's range where rms~ does not, as in RMSNorm itself.
    """
    if block_weights is not None:
        return _weighted_mean_square(absmax, p, _checked_weights(block_weights, absmax))
    c = rms_constant(p, block_size)
    if p == 2:
        return absmax.square().mean(-1, keepdim=True) / c**2
    if p == 1:
        return (absmax.mean(-1, keepdim=True) / c).square()
    return (_power_mean(absmax, p) / c).square()


def _weighted_mean_square(absmax: Tensor, p: float, weights: Tensor) -> Tensor:
    if p == 2:
        return (absmax.square() * weights).sum(-1, keepdim=True)
    if p == 1:
        return (absmax * weights).sum(-1, keepdim=True).square()
    return _weighted_power_sum(absmax, p, weights).square()


def _checked_weights(block_weights: Tensor, absmax: Tensor) -> Tensor:
    width = absmax.shape[-1]
    if block_weights.shape != (width,):
        raise ValueError(
            f"block_weights has shape {tuple(block_weights.shape)}; the rows have {width} blocks, "
            f"so it must be [{width}]"
        )
    return block_weights.to(absmax.dtype)


def rms_estimate(
    x: Tensor, *, p: float = 2.0, block_size: int = 32, block_weights: Tensor | None = None
) -> Tensor:
    """RMS of each row, estimated from its block absmaxes: G_p / c(p, B) (paper, section 3).

    Args:
        x: [..., D], D divisible by ``block_size``; floating point.
        p: exponent of the generalised mean, > 0.
        block_size: elements per block.
        block_weights: [K], non-negative; with them the estimate is (sum_k w_k m_k^p)^(1/p), for
            data whose blocks do not share one Gaussian scale.

    Returns:
        [..., 1], float32 (float64 for float64 input), differentiable in ``x``.
    """
    absmax = block_absmax(x.to(compute_dtype(x)), block_size)
    if block_weights is not None:
        return _weighted_power_sum(absmax, p, _checked_weights(block_weights, absmax))
    return _power_mean(absmax, p) / rms_constant(p, block_size)


def bound_of_normalized(
    estimator: Estimator,
    p: float,
    width: int,
    block_size: int,
    block_weights: Tensor | None = None,
) -> float:
    """The largest |x| / rms that a row of ``width`` elements can have.

    sqrt(D) of the exact RMS; c K^(1/p) of the estimate, reached by a row with one block that is
    not 0; w^(-1/p) of the smallest weight with ``block_weights``. Infinite where a weight is 0 or
    float64 ends.
    """
    if estimator == "exact":
        return math.sqrt(width)
    count = width // block_size
    if block_weights is None:
        return rms_constant(p, block_size) * _root(count, p)
    if block_weights.shape != (count,):
        raise ValueError(
            f"block_weights has shape {tuple(block_weights.shape)}; it must be [{count}], one for "
            f"each of the blocks of {block_size} in {width}"
        )
    smallest = float(block_weights.min())
    if smallest < 0:
        raise ValueError(f"block_weights has {smallest}; none may be negative")
    return _root(1 / smallest, p) if smallest > 0 else math.inf


def _root(x: float, p: float) -> float:
    try:
        return math.pow(x, 1 / p)
    except OverflowError:
        return math.inf


def mean_square(
    x: Tensor,
    estimator: Estimator,
    p: float,
    block_size: int,
    block_weights: Tensor | None = None,
) -> Tensor:
    """Mean square of each row [..., D] -> [..., 1], exact or estimated."""
    if estimator == "exact":
        if block_weights is not None:
            raise ValueError("block_weights belong to estimator='mxnorm'; estimator is 'exact'")
        return x.pow(2).mean(-1, keepdim=True)
    return mean_square_from_absmax(block_absmax(x, block_size), p, block_size, block_weights)


def mean_square_vjp(
    x: Tensor,
    grad: Tensor,
    estimator: Estimator,
    p: float,
    block_size: int,
    block_weights: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`mean_square` in ``x`` for its cotangent ``grad`` [..., 1].

    Within a block the elements of the largest magnitude share the gradient, as in autograd's
    amax. Written out, so that it can be traced where autograd does not record.
    """
    if estimator == "exact":
        return x * (grad * (2 / x.shape[-1]))
    in_blocks = blocks(x, block_size)
    magnitudes = in_blocks.abs()
    absmax = magnitudes.amax(-1)
    slope = _absmax_slope(absmax, p, block_size, block_weights) * grad
    largest = (magnitudes == absmax.unsqueeze(-1)).to(x.dtype)
    share = (slope / largest.sum(-1)).unsqueeze(-1)
    return (in_blocks.sign() * largest * share).reshape(x.shape)


def _absmax_slope(
    absmax: Tensor, p: float, block_size: int, block_weights: Tensor | None
) -> Tensor:
    """d rms~^2 / d m_k, [..., K]: 2 w_k m_k^(p - 1) rms~^(2 - p), with w_k = 1 / (K c^p)."""
    if block_weights is None:
        c = rms_constant(p, block_size)
        weights: float | Tensor = 1 / (absmax.shape[-1] * c**p)
    else:
        weights = block_weights.to(absmax.dtype)
    if p == 2:
        return absmax * (2 * weights)
    rms = mean_square_from_absmax(absmax, p, block_size, block_weights).sqrt()
    if p == 1:
        return 2 * weights * rms.expand_as(absmax)
    # Blocks of zeros contribute nothing, and 0^(p - 1) is infinite for p < 1.
    ratio = absmax / rms
    return torch.where(absmax > 0, 2 * weights * rms * ratio.pow(p - 1), 0.0)
