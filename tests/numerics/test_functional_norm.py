"""The eager norm and its estimate against float64 formulas, HuggingFace's norm and torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edge_cases import BLOCK_SIZE, WIDTH, EdgeCase
from numerics import (
    BLOCKS,
    EPS,
    U64,
    U,
    all_edges,
    all_gradients,
    all_inputs,
    assert_bits_equal,
    estimate_error,
    gain,
    gradients,
    llama_norm,
    normal,
    rms_estimate64,
    ulps_apart,
)
from scipy import integrate, special
from torch import Tensor

from mxnorm_pass.functional import rms_constant, rms_estimate
from mxnorm_pass.numerics.cast import mx_dequantize
from mxnorm_pass.numerics.norm import Gradient, inverse_rms, mxnorm, mxnorm_vjp
from mxnorm_pass.numerics.norm_cast import mxnorm_cast
from mxnorm_pass.numerics.rms import Estimator

# --- rms_constant ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "block_size", "value"),
    [(1, 32, 2.347079199), (2, 32, 2.389457115), (1, 16, 2.077204480), (2, 16, 2.132949994)],
)
def test_rms_constant_of_the_design(p: float, block_size: int, value: float) -> None:
    # The values are given to nine decimals.
    assert abs(rms_constant(p, block_size) - value) < 1e-9


@pytest.mark.parametrize("block_size", [1, 2, 16, 32, 128])
@pytest.mark.parametrize("p", [0.25, 0.5, 1, 1.5, 2, 3, 4, 8, 16])
def test_rms_constant_against_the_density_of_the_maximum(p: float, block_size: int) -> None:
    # The density of max_b |z_b|, by another quadrature than rms_constant's.
    def integrand(t: float) -> float:
        below = special.erf(t / math.sqrt(2)) ** (block_size - 1)
        return t**p * block_size * below * math.sqrt(2 / math.pi) * math.exp(-t * t / 2)

    # Above t = 40 the density is under exp(-800), zero in float64.
    moment, error = integrate.quad(
        integrand, 0, 40, points=[0.5, 1, 2, 3, 4, 6, 9], epsabs=0, epsrel=1e-11, limit=500
    )
    assert error <= 1e-11 * moment
    # quad's 1e-11 and the B - 1 < 128 roundings in the power of erf (1.4e-14), times 1/p <= 4.
    assert rms_constant(p, block_size) == pytest.approx(moment ** (1 / p), rel=4.1e-11, abs=0)


@lru_cache
def absmaxes(block_size: int) -> Tensor:
    """Of blocks of Gaussians."""
    return normal(100_000, block_size, seed=block_size).abs().amax(-1).double()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_rms_constant_against_samples(p: float, block_size: int) -> None:
    powers = absmaxes(block_size).pow(p)
    sampled = float(powers.mean()) ** (1 / p)
    # The p-th root divides the relative error of the mean by p.
    standard_error = sampled * float(powers.std() / powers.mean()) / math.sqrt(len(powers)) / p
    assert standard_error < 1e-3 * sampled
    assert abs(rms_constant(p, block_size) - sampled) < 4 * standard_error


@pytest.mark.parametrize("p", [0.05, 0.2, 0.75, 2.5, 40])
def test_rms_constant_of_single_elements(p: float) -> None:
    # E|z|^p = 2^(p/2) Gamma((p + 1) / 2) / sqrt(pi).
    log_moment = p / 2 * math.log(2) + math.lgamma((p + 1) / 2) - math.log(math.pi) / 2
    # A few roundings of logarithms up to 60, the p-th root halves or (small p) magnifies them.
    assert rms_constant(p, 1) == pytest.approx(
        math.exp(log_moment / p), rel=400 * U64 * max(1, 1 / p), abs=0
    )


def test_rms_constant_of_single_elements_is_one_for_p_2() -> None:
    # E z^2 = 1; the integral is taken to 30 digits, so one rounding to float64 is left.
    assert abs(rms_constant(2, 1) - 1) <= U64


@pytest.mark.parametrize("p", [0.5, 1, 2, 3])
def test_rms_constant_grows_with_the_block(p: float) -> None:
    values = [rms_constant(p, block_size) for block_size in (1, 2, 16, 32, 128)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False))


def test_rms_constant_grows_with_p() -> None:
    # Power means of one distribution.
    values = [rms_constant(p, 32) for p in (0.25, 0.5, 1, 1.5, 2, 3, 4, 8, 16)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("p", [0, -1, -0.5, math.inf, -math.inf, math.nan])
def test_bad_p_is_named(p: float) -> None:
    with pytest.raises(ValueError, match="finite number > 0") as error:
        rms_constant(p, 32)
    assert str(p) in str(error.value)
    with pytest.raises(ValueError, match="finite number > 0"):
        mxnorm(torch.ones(1, 32), eps=EPS, p=p)


@pytest.mark.parametrize("block_size", [0, -1, -32])
def test_bad_block_size_is_named(block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1") as error:
        rms_constant(2, block_size)
    assert str(block_size) in str(error.value)


# --- rms_estimate ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 37.0])
@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3, 4])
def test_estimate_converges_to_the_rms_of_gaussians(p: float, sigma: float) -> None:
    blocks = 8192
    x = sigma * normal(1, blocks * BLOCK_SIZE, seed=int(10 * p))
    # Var m^p = c(2p)^2p - c(p)^2p (sigma = 1); the mean over K independent blocks has 1/K of
    # it, and the p-th root divides the relative deviation by p. Five deviations: odds of 6e-7.
    mean = rms_constant(p, BLOCK_SIZE) ** p
    variance = rms_constant(2 * p, BLOCK_SIZE) ** (2 * p) - mean**2
    deviation = math.sqrt(variance / blocks) / mean / p
    assert deviation < 0.004
    assert abs(rms_estimate(x, p=p).item() / sigma - 1) < 5 * deviation


@pytest.mark.parametrize("p", [1, 2])
@all_inputs
def test_estimate_against_the_direct_formula(dtype: torch.dtype, p: int) -> None:
    x = normal(16, WIDTH, dtype=dtype)
    absmax = x.double().reshape(16, BLOCKS, BLOCK_SIZE).abs().amax(-1)
    if p == 1:
        expected = absmax.mean(-1, keepdim=True) / rms_constant(1, BLOCK_SIZE)
    else:
        expected = absmax.square().mean(-1, keepdim=True).sqrt() / rms_constant(2, BLOCK_SIZE)
    actual = rms_estimate(x, p=p)
    assert actual.dtype == torch.float32 and actual.shape == (16, 1)
    torch.testing.assert_close(actual.double(), expected, rtol=estimate_error(p), atol=0)


# m^3.7 leaves float32's range at 1e15 and 1e-15, m^2 at 1e30 and 1e-30.
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15, 1e30, 1e-30])
@pytest.mark.parametrize("p", [0.3, 1, 1.5, 2, 3.7])
def test_estimate_within_the_range_of_the_elements(p: float, scale: float) -> None:
    x = normal(16, WIDTH) * scale
    torch.testing.assert_close(
        rms_estimate(x, p=p).double(), rms_estimate64(x, p), rtol=estimate_error(p), atol=0
    )


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e37, 1e-24, 1e-35])
@pytest.mark.parametrize("p", [0.3, 1, 2, 3, 3.7, 16])
def test_weighted_estimate_within_the_range_of_the_elements(p: float, scale: float) -> None:
    """The plain estimate's weights give the plain estimate; others the formula in float64."""
    x = normal(16, WIDTH) * scale
    plain = torch.full((BLOCKS,), 1 / (BLOCKS * rms_constant(p, BLOCK_SIZE) ** p))
    uneven = plain * torch.linspace(0.0, 3.0, BLOCKS)
    m = x.double().reshape(16, BLOCKS, BLOCK_SIZE).abs().amax(-1)
    for weights in (plain, uneven):
        actual = rms_estimate(x, p=p, block_weights=weights)
        unit = m.amax(-1, keepdim=True)
        expected = unit * ((m / unit).pow(p) @ weights.double()[:, None]).pow(1 / p)
        # Beside the mean's powers one of each weight, a product with it and one with their sum.
        tolerance = 2 * estimate_error(p) + 4 * U
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("p", [1, 2, 3, 16])
def test_a_huge_block_without_weight_does_not_count(p: float) -> None:
    x = normal(4, 64)
    x[:, 32:] *= 1e20
    weights = torch.tensor([0.5, 0.0])
    expected = 0.5 ** (1 / p) * x[:, :32].abs().amax(-1, keepdim=True)
    torch.testing.assert_close(rms_estimate(x, p=p, block_weights=weights), expected)


def test_rows_and_weights_of_zeros_estimate_zero() -> None:
    for x, weights in ((torch.zeros(2, 64), torch.ones(2)), (torch.ones(2, 64), torch.zeros(2))):
        for p in (0.5, 1.0, 2.0, 3.0):
            x = x.clone().requires_grad_()
            estimate = rms_estimate(x, p=p, block_weights=weights)
            assert not estimate.any()
            (grad,) = torch.autograd.grad(estimate.sum(), x)
            assert grad.isfinite().all()


@pytest.mark.parametrize("p", [0.3, 1, 2, 3.7])
def test_estimate_in_float64(p: float) -> None:
    x = normal(4, WIDTH, dtype=torch.float64)
    actual = rms_estimate(x, p=p)
    assert actual.dtype == torch.float64
    # The operations of float32's bound, on both sides.
    tolerance = 2 * estimate_error(p) * U64 / U
    torch.testing.assert_close(actual, rms_estimate64(x, p), rtol=tolerance, atol=0)


@pytest.mark.parametrize("p", [1, 2, 3.7])
def test_norm_is_bounded_by_the_exponent(p: float) -> None:
    # |y| <= m / rms~ and G_p >= m K^(-1/p), so |y| <= c K^(1/p); one spike reaches it.
    x = normal(8, WIDTH)
    x[0] = 0.0
    x[0, 40] = 3.0
    y = mxnorm(x, eps=0.0, p=p).double().abs()
    bound = rms_constant(p, BLOCK_SIZE) * BLOCKS ** (1 / p)
    error = estimate_error(p) + U
    assert y.max() <= bound * (1 + error)
    assert y[0].max() >= bound * (1 - error)


# --- zero rows ------------------------------------------------------------------------------


@all_gradients
@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3])
def test_zero_rows_stay_finite(p: float, gradient: Gradient) -> None:
    x = normal(4, WIDTH)
    x[1] = 0.0
    x[2, :BLOCK_SIZE] = 0.0
    x[3, 5:] = 0.0
    x.requires_grad_()
    weight = gain().requires_grad_()
    grad = normal(4, WIDTH, seed=1)
    y = mxnorm(x, weight, eps=EPS, p=p, gradient=gradient)
    dx, dw = gradients(y, grad, x, weight)
    assert y.isfinite().all() and dx.isfinite().all()
    assert dw is not None and dw.isfinite().all()
    assert torch.equal(y[1], torch.zeros(WIDTH))
    # y is (x rho) w at x = 0, where rho = 1 / sqrt(eps) is stationary: dx = (g w) rho.
    rho = torch.rsqrt(torch.zeros(()) + EPS)
    assert torch.equal(dx[1], grad[1] * weight.detach() * rho)


@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
def test_zero_rows_cast_to_zeros(estimator: Estimator) -> None:
    values, scales, rho = mxnorm_cast(torch.zeros(2, 64), eps=EPS, estimator=estimator)
    assert torch.equal(mx_dequantize(values, scales), torch.zeros(2, 64))
    assert torch.equal(rho, torch.rsqrt(torch.full((2, 1), EPS)))


# --- the exact norm -------------------------------------------------------------------------


def exact_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [normal(8, WIDTH, dtype=dtype), normal(2, 3, 1000, dtype=dtype)]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["w32", "w16"])
@all_inputs
def test_exact_equals_llama_norm(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for x in exact_inputs(dtype):
        weight = gain(x.shape[-1], weight_dtype)
        expected = llama_norm(weight)(x)
        actual = mxnorm(
            x, weight, eps=EPS, estimator="exact", norm_dtype=dtype, out_dtype=expected.dtype
        )
        assert_bits_equal(actual, expected)


@all_inputs
@all_edges
def test_exact_equals_llama_norm_on_edge_cases(case: EdgeCase, dtype: torch.dtype) -> None:
    x = case.x(dtype)
    weight = gain(x.shape[-1], dtype)
    actual = mxnorm(x, weight, eps=EPS, estimator="exact", norm_dtype=dtype)
    assert_bits_equal(actual, llama_norm(weight)(x))


@all_inputs
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_exact_gradients_equal_llama_norms(dtype: torch.dtype, eps: float) -> None:
    x = normal(8, WIDTH, dtype=dtype).requires_grad_()
    norm = llama_norm(gain(dtype=dtype), eps)
    grad = normal(8, WIDTH, seed=1, dtype=dtype)
    expected = torch.autograd.grad(norm(x), [x, norm.weight], grad)
    y = mxnorm(x, norm.weight, eps=eps, estimator="exact", norm_dtype=dtype)
    for a, e in zip(torch.autograd.grad(y, [x, norm.weight], grad), expected, strict=True):
        assert_bits_equal(a, e)
    rho = inverse_rms(x.detach(), eps=eps, estimator="exact")
    actual = mxnorm_vjp(
        grad, x.detach(), norm.weight.detach(), rho, eps=eps, estimator="exact", norm_dtype=dtype
    )
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_exact_equals_rms_norm() -> None:
    # Over one and the same mean of squares, two roundings are left in x rho w, in either order:
    # each result is within one ulp of the true product.
    for x in exact_inputs(torch.float32):
        weight = gain(x.shape[-1])
        expected = F.rms_norm(x, (x.shape[-1],), weight, EPS)
        assert ulps_apart(mxnorm(x, weight, eps=EPS, estimator="exact"), expected) <= 2
        expected = F.rms_norm(x, (x.shape[-1],), None, EPS)
        assert ulps_apart(mxnorm(x, eps=EPS, estimator="exact"), expected) <= 2


# --- bad arguments --------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mxnorm, mxnorm_cast, inverse_rms])
@pytest.mark.parametrize("bad", ["rms", "MXNorm", ""])
def test_unknown_estimator_is_named(bad: str, function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="allowed: mxnorm, exact") as error:
        function(torch.ones(1, 32), eps=EPS, estimator=bad)
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
@pytest.mark.parametrize("function", [mxnorm, inverse_rms])
@pytest.mark.parametrize("bad", ["false", "True", ""])
def test_unknown_gradient_is_named_by_the_forward(
    bad: str, function: Callable[..., Any], estimator: Estimator
) -> None:
    for x in (torch.ones(1, 32), torch.ones(1, 32, requires_grad=True)):
        with pytest.raises(ValueError, match="allowed: true, orthogonal, paper") as error:
            function(x, eps=EPS, estimator=estimator, gradient=bad)
        assert repr(bad) in str(error.value)


@pytest.mark.parametrize("function", [mxnorm, inverse_rms, rms_estimate])
@pytest.mark.parametrize("bad", [0, -1, -32])
def test_block_size_below_1_is_named_by_the_norm(bad: int, function: Callable[..., Any]) -> None:
    eps = {} if function is rms_estimate else {"eps": EPS}
    with pytest.raises(ValueError, match="at least 1") as error:
        function(torch.ones(1, 32), block_size=bad, **eps)
    assert f"block_size is {bad};" in str(error.value)
