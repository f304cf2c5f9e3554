"""The eager reference against float64 formulas, HuggingFace's norm and torch's own autograd.

``U`` is float32's unit roundoff: one operation rounded to nearest has a relative error of at
most ``U``. Tolerances below count such operations.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edge_cases import BLOCK_SIZE, EDGE_CASES, EdgeCase, bits_equal, describe_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mxnorm_pass.config import Estimator, Gradient
from mxnorm_pass.formats import SCALE_MODES, ScaleMode
from mxnorm_pass.functional import (
    inverse_rms,
    mx_cast,
    mx_dequantize,
    mx_linear,
    mxnorm,
    mxnorm_cast,
    mxnorm_vjp,
    rms_constant,
    rms_estimate,
)

U = 2.0**-24
U64 = 2.0**-53
EPS = 1e-6
WIDTH = 128
BLOCKS = WIDTH // BLOCK_SIZE
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

GRADIENTS: tuple[Gradient, ...] = ("true", "orthogonal", "paper")
# (norm_dtype follows the input, norm_dtype is None): HuggingFace's rounding and F.rms_norm's.
ROUNDINGS = {"huggingface": True, "rms_norm": False}

all_gradients = pytest.mark.parametrize("gradient", GRADIENTS)
all_inputs = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
all_modes = pytest.mark.parametrize("mode", SCALE_MODES)
all_elements = pytest.mark.parametrize("elem_dtype", [E4M3, E5M2], ids=["e4m3fn", "e5m2"])
all_edges = pytest.mark.parametrize("case", EDGE_CASES, ids=str)
with_and_without_weight = pytest.mark.parametrize("weighted", [False, True])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def gain(
    width: int = WIDTH, dtype: torch.dtype = torch.float32, low: float = 0.5, high: float = 1.5
) -> Tensor:
    uniform = torch.rand(width, generator=generator(99), dtype=torch.float64)
    return (low + (high - low) * uniform).to(dtype)


def separated(rows: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    """float64 rows whose block maxima lead by at least 0.5: no ties within any small step."""
    x = 2 * torch.rand(rows, width, generator=generator(seed), dtype=torch.float64) - 1
    blocks = x.reshape(rows, -1, BLOCK_SIZE)
    count = blocks.shape[1]
    where = torch.randint(0, BLOCK_SIZE, (rows, count, 1), generator=generator(seed + 1))
    signs = 1.0 - 2.0 * (torch.arange(count) % 2)
    peaks = signs[:, None] * (1.5 + torch.rand(rows, count, 1, generator=generator(seed + 2)))
    return blocks.scatter(-1, where, peaks.double()).reshape(rows, width)


def rms_estimate64(x: Tensor, p: float) -> Tensor:
    """G_p / c(p, B) in float64, the largest block taken out so that nothing over- or underflows."""
    absmax = x.double().reshape(*x.shape[:-1], -1, BLOCK_SIZE).abs().amax(-1)
    largest = absmax.amax(-1, keepdim=True)
    mean = (absmax / largest).pow(p).mean(-1, keepdim=True)
    return largest * mean.pow(1 / p) / rms_constant(p, BLOCK_SIZE)


def inverse_rms64(x: Tensor, p: float, eps: float) -> Tensor:
    return 1 / torch.sqrt(rms_estimate64(x, p).square() + eps)


def estimate_error(p: float, blocks: int = BLOCKS) -> float:
    """Bound on the relative error of the float32 estimate, and of its inverse square root.

    The mean of powers: dividing by the largest block and a pow good to one ulp make each term
    good to (p + 2) U, a sum of positive terms and its division add ``blocks`` U. The p-th root
    divides that by p, pow adds 2 U, and 1/p rounded to float32 adds U |ln mean| / p, where
    1/blocks <= mean <= 1. Six more operations: times largest, over c, square, + eps (halved by
    the root, as is the square), and a sqrt and division for rsqrt. Squares in place of pow
    (p = 2) and no pow (p = 1) take fewer.
    """
    return ((p + 2 + blocks + math.log(blocks)) / p + 2 + 6) * U


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """Largest distance between float32 tensors, counted in representable numbers."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((ordered(a) - ordered(b)).abs().max())


def assert_bits_equal(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None and expected is not None
    assert bits_equal(actual, expected), describe_difference(actual, expected)


def gradients(
    y: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    leaves = [x] if weight is None else [x, weight]
    grads = torch.autograd.grad(y, leaves, grad)
    return grads[0], grads[1] if weight is not None else None


# --- rms_constant ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "block_size", "value"),
    [(1, 32, 2.347079199), (2, 32, 2.389457115), (1, 16, 2.077204480), (2, 16, 2.132949994)],
)
def test_rms_constant_of_the_design(p: float, block_size: int, value: float) -> None:
    # The values are given to nine decimals.
    assert abs(rms_constant(p, block_size) - value) < 1e-9


SMALL_P = pytest.mark.xfail(
    strict=True, reason="rms_constant integrates t^(p-1), unbounded at 0, too coarsely"
)


@pytest.mark.parametrize("block_size", [1, 2, 16, 32, 128])
@pytest.mark.parametrize("p", [pytest.param(0.25, marks=SMALL_P), 0.5, 1, 1.5, 2, 3, 4, 8, 16])
def test_rms_constant_against_the_density_of_the_maximum(p: float, block_size: int) -> None:
    # By parts of the tail integral that rms_constant takes: the density of max_b |z_b|.
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


@pytest.mark.parametrize(
    "p", [pytest.param(0.05, marks=SMALL_P), pytest.param(0.2, marks=SMALL_P), 0.75, 2.5, 40]
)
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


# At 1e15 and 1e-15, m^3.7 leaves float32's range and m^2 does not.
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
@pytest.mark.parametrize("p", [0.3, 1.5, 3.7])
def test_estimate_for_general_p(p: float, scale: float) -> None:
    x = normal(16, WIDTH) * scale
    torch.testing.assert_close(
        rms_estimate(x, p=p).double(), rms_estimate64(x, p), rtol=estimate_error(p), atol=0
    )


@pytest.mark.xfail(strict=True, reason="rms_estimate squares, then takes the root, in float32")
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("p", [1, 2, 3.7])
def test_estimate_where_squares_leave_the_range(p: float, scale: float) -> None:
    x = normal(16, WIDTH) * scale
    torch.testing.assert_close(
        rms_estimate(x, p=p).double(), rms_estimate64(x, p), rtol=estimate_error(p), atol=0
    )


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


def llama_norm(weight: Tensor, eps: float = EPS) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(len(weight), eps=eps).to(weight.dtype)
    norm.weight.data = weight.clone()
    return norm


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


@pytest.mark.parametrize("bad", ["rms", "MXNorm", ""])
def test_unknown_estimator_is_named(bad: str) -> None:
    with pytest.raises(ValueError, match="allowed: mxnorm, exact") as error:
        mxnorm(torch.ones(1, 32), eps=EPS, estimator=bad)  # type: ignore[arg-type]
    assert repr(bad) in str(error.value)


@pytest.mark.xfail(strict=True, reason="mxnorm_cast takes any unknown estimator for mxnorm")
def test_unknown_estimator_of_the_cast_is_named() -> None:
    with pytest.raises(ValueError, match="allowed: mxnorm, exact"):
        mxnorm_cast(torch.ones(1, 32), eps=EPS, estimator="rms")  # type: ignore[arg-type]


def test_unknown_gradient_is_named() -> None:
    x = torch.ones(1, 32, requires_grad=True)
    with pytest.raises(ValueError, match="allowed: true, orthogonal, paper") as error:
        mxnorm(x, eps=EPS, gradient="false").sum().backward()  # type: ignore[arg-type]
    assert "'false'" in str(error.value)


# --- gradients ------------------------------------------------------------------------------


@with_and_without_weight
@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3])
def test_true_gradient_is_the_derivative(p: float, estimator: Estimator, weighted: bool) -> None:
    x = separated(2, 96).requires_grad_()
    inputs = [x]
    if weighted:
        inputs.append(gain(96, torch.float64).requires_grad_())

    def norm(*args: Tensor) -> Tensor:
        return mxnorm(*args, eps=1e-3, p=p, estimator=estimator, gradient="true")

    # Central differences with step h = 1e-6 of values below 10 that vary on a scale of 1:
    # truncation ~ h^2 = 1e-12, roundoff ~ 10 * 50 U64 / h = 6e-8.
    assert torch.autograd.gradcheck(norm, inputs, eps=1e-6, atol=1e-7, rtol=0)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_true_gradient_at_ties_is_shared_as_by_amax(p: int) -> None:
    x = separated(1)
    blocks = x.view(BLOCKS, BLOCK_SIZE)
    blocks[0] = 1.25
    blocks[1, :4] = torch.tensor([2.75, -2.75, 2.75, -2.75])
    x.requires_grad_()
    grad = normal(1, WIDTH, dtype=torch.float64)
    actual = torch.autograd.grad(mxnorm(x, eps=EPS, p=p, gradient="true"), x, grad)[0]

    absmax = x.reshape(1, BLOCKS, BLOCK_SIZE).abs().amax(-1)
    mean_square = absmax.pow(p).mean(-1, keepdim=True).pow(2 / p) / rms_constant(p, 32) ** 2
    by_autograd = torch.autograd.grad(x * torch.rsqrt(mean_square + EPS), x, grad)[0]

    with torch.no_grad():
        rho = inverse_rms64(x, p, EPS)
        m = absmax.unsqueeze(-1)
        at_max = (x.reshape(1, BLOCKS, BLOCK_SIZE).abs() == m).double()
        shares = at_max / at_max.sum(-1, keepdim=True)
        assert at_max.sum() == BLOCK_SIZE + 4 + 2
        # d rms~^2 / d m_k = 2 rms~^2 m_k^(p-1) / sum m^p.
        d_square = 2 * rms_estimate64(x, p).square() * absmax.pow(p - 1)
        d_square = d_square / absmax.pow(p).sum(-1, keepdim=True)
        d_x = (d_square.unsqueeze(-1) * shares).reshape(1, WIDTH) * x.sign()
        dr = (grad * x).sum(-1, keepdim=True)
        explicit = rho * grad - rho.pow(3) / 2 * dr * d_x
    # A sum over WIDTH products of numbers of order 1 times a dozen factors of order 1.
    tolerance = 10 * WIDTH * U64
    torch.testing.assert_close(actual, by_autograd, rtol=0, atol=tolerance)
    torch.testing.assert_close(actual, explicit, rtol=0, atol=tolerance)


def explicit_gradient(
    x: Tensor, grad: Tensor, rho: Tensor, gradient: Gradient, eps: float
) -> tuple[Tensor, Tensor]:
    """dx by DESIGN section 1 in float64, and the sum of magnitudes that its error scales with."""
    if gradient == "orthogonal":
        square = 1 / (x.square().mean(-1, keepdim=True) + eps)
    else:
        square = rho.square()
    factor = rho * square / x.shape[-1]
    dr = (grad * x).sum(-1, keepdim=True)
    size = (rho * grad).abs() + factor * x.abs() * (grad * x).abs().sum(-1, keepdim=True)
    return rho * grad - factor * x * dr, size


@with_and_without_weight
@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("gradient", ["orthogonal", "paper"])
def test_straight_through_gradients_by_formula(
    gradient: Gradient, p: float, weighted: bool
) -> None:
    x = 3 * normal(4, WIDTH, dtype=torch.float64)
    grad = normal(4, WIDTH, seed=1, dtype=torch.float64)
    weight = gain(dtype=torch.float64) if weighted else None
    leaf = x.clone().requires_grad_()
    y = mxnorm(leaf, weight, eps=EPS, p=p, gradient=gradient)
    actual = torch.autograd.grad(y, leaf, grad)[0]
    upstream = grad if weight is None else grad * weight
    rho = inverse_rms64(x, p, EPS)
    expected, size = explicit_gradient(x, upstream, rho, gradient, EPS)
    # A sum of WIDTH products, and three times the relative error of rho, on both sides.
    tolerance = 2 * (WIDTH + 3 * estimate_error(p) / U + 8) * U64
    assert ((actual - expected).abs() <= tolerance * size).all()


@all_gradients
def test_gradient_of_the_exact_norm_does_not_depend_on_the_choice(gradient: Gradient) -> None:
    x = normal(4, WIDTH, dtype=torch.float64).requires_grad_()
    grad = normal(4, WIDTH, seed=1, dtype=torch.float64)
    y = mxnorm(x, eps=EPS, estimator="exact", gradient=gradient)
    actual = torch.autograd.grad(y, x, grad)[0]
    expected = torch.autograd.grad(F.rms_norm(x, (WIDTH,), None, EPS), x, grad)[0]
    rho = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + EPS)
    size = explicit_gradient(x.detach(), grad, rho, "paper", EPS)[1]
    assert ((actual - expected).abs() <= 2 * (2 * WIDTH + 20) * U64 * size).all()


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_orthogonal_gradient_is_orthogonal(seed: int, p: float, eps: float) -> None:
    x = normal(8, WIDTH, seed=seed, dtype=torch.float64)
    x[0] *= 5.0
    x[1, 17] = 60.0
    x.requires_grad_()
    grad = normal(8, WIDTH, seed=seed + 10, dtype=torch.float64)
    dx = torch.autograd.grad(mxnorm(x, eps=eps, p=p, gradient="orthogonal"), x, grad)[0]
    x = x.detach()
    dot = (dx * x).sum(-1)
    # x . dx = rho~ (g . x) eps / (ms + eps), so the cosine is about eps cos(g, x) here.
    mean_square = x.square().mean(-1)
    remainder = inverse_rms64(x, p, eps).squeeze(-1) * (grad * x).sum(-1) * eps
    remainder = remainder / (mean_square + eps)
    size = dx.norm(dim=-1) * x.norm(dim=-1)
    assert (dot.abs() < 1e-6 * size).all()
    # Two sums of WIDTH products and rho, each relative to the norms they are made of.
    rho_size = inverse_rms64(x, p, eps).squeeze(-1) * grad.norm(dim=-1) * x.norm(dim=-1)
    tolerance = 4 * (WIDTH + 20) * U64 * (size + rho_size)
    assert ((dot - remainder).abs() <= tolerance).all()


def vjp_of_both(
    dtype: torch.dtype, gradient: Gradient, estimator: Estimator, weighted: bool, p: float
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    options: dict[str, Any] = {
        "eps": EPS, "p": p, "estimator": estimator, "gradient": gradient, "norm_dtype": dtype
    }  # fmt: skip
    x = normal(2, 4, WIDTH, dtype=dtype).requires_grad_()
    weight = gain(dtype=dtype).requires_grad_() if weighted else None
    grad = normal(2, 4, WIDTH, seed=1, dtype=dtype)
    by_autograd = gradients(mxnorm(x, weight, **options), grad, x, weight)
    rho = inverse_rms(x.detach(), eps=EPS, p=p, estimator=estimator)
    detached = None if weight is None else weight.detach()
    return mxnorm_vjp(grad, x.detach(), detached, rho, **options), by_autograd


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"]
)
@all_gradients
@with_and_without_weight
@pytest.mark.parametrize(
    ("estimator", "p"), [("mxnorm", 1), ("mxnorm", 2), ("mxnorm", 1.5), ("exact", 2)]
)
def test_vjp_equals_autograd(
    estimator: Estimator, p: float, weighted: bool, gradient: Gradient, dtype: torch.dtype
) -> None:
    (dx, dw), (expected_dx, expected_dw) = vjp_of_both(dtype, gradient, estimator, weighted, p)
    assert_bits_equal(dx, expected_dx)
    assert dx.dtype == dtype
    if weighted:
        assert_bits_equal(dw, expected_dw)
    else:
        assert dw is None


@all_gradients
@pytest.mark.parametrize("p", [1, 2])
def test_vjp_of_bfloat16_rounds_once(p: float, gradient: Gradient) -> None:
    # With norm_dtype=None the backward of bf16 input is that of the widened input, rounded.
    x, grad = normal(4, WIDTH).bfloat16(), normal(4, WIDTH, seed=1).bfloat16()
    weight = gain().bfloat16()
    options: dict[str, Any] = {"eps": EPS, "p": p, "gradient": gradient}
    rho = inverse_rms(x, eps=EPS, p=p)
    dx, _ = mxnorm_vjp(grad, x, weight, rho, **options)
    wide, _ = mxnorm_vjp(grad.float(), x.float(), weight.float(), rho, **options)
    assert_bits_equal(dx, wide.bfloat16())


# --- mxnorm_cast ----------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@all_inputs
@all_elements
@all_modes
def test_exact_cast_is_norm_then_cast(
    mode: ScaleMode,
    elem_dtype: torch.dtype,
    dtype: torch.dtype,
    rounding: str,
    weight_dtype: torch.dtype | None,
) -> None:
    norm: dict[str, Any] = {
        "eps": EPS, "estimator": "exact", "norm_dtype": dtype if ROUNDINGS[rounding] else None
    }  # fmt: skip
    cast: dict[str, Any] = {"elem_dtype": elem_dtype, "scale_mode": mode}
    for x in [normal(2, 3, WIDTH, dtype=dtype)] + [case.x(dtype) for case in EDGE_CASES]:
        weight = None if weight_dtype is None else gain(x.shape[-1], weight_dtype)
        values, scales, rho = mxnorm_cast(x, weight, **norm, **cast)
        expected_values, expected_scales = mx_cast(mxnorm(x, weight, **norm), **cast)
        assert_bits_equal(values, expected_values)
        assert_bits_equal(scales, expected_scales)
        assert_bits_equal(rho, inverse_rms(x, eps=EPS, estimator="exact"))


@all_modes
def test_exact_cast_equals_llama_norm_then_cast(mode: ScaleMode) -> None:
    # The bf16 roundings before and after the gain are there: without them bits differ.
    x, weight = normal(32, WIDTH).bfloat16(), gain().bfloat16()
    expected = mx_cast(llama_norm(weight)(x), scale_mode=mode)
    options: dict[str, Any] = {"eps": EPS, "estimator": "exact", "scale_mode": mode}
    actual = mxnorm_cast(x, weight, norm_dtype=torch.bfloat16, **options)
    assert_bits_equal(actual[0], expected[0])
    assert_bits_equal(actual[1], expected[1])
    unrounded = mxnorm_cast(x, weight, **options)
    assert not bits_equal(unrounded[0], expected[0])


def assert_within_half_an_ulp(
    values: Tensor, scales: Tensor, y: Tensor, relative_error: float, mode: ScaleMode
) -> None:
    """|v s - y| against what rounding y / s to the element type allows.

    With ``mantissa`` explicit bits the spacing at |u| in [2^e, 2^(e+1)) is 2^(e - mantissa), so
    rounding u = y / s to nearest moves it by at most 2^-(mantissa + 1) |u|, half of the type's
    eps; below the smallest normal the spacing is the smallest subnormal. Multiplied by s:
    eps / 2 |y|, or half of the smallest subnormal times s; for e4m3fn 2^-4 |y| or 2^-10 s.
    Elements above the largest finite one go to it first, which "rceil" and "ceil" rule out: their
    scale is at least absmax / max. y itself comes out of float32 with ``relative_error``.
    """
    info = torch.finfo(values.dtype)
    s = scales.float().double().repeat_interleave(BLOCK_SIZE, dim=-1)
    saturated = (y / s).clamp(-info.max, info.max) * s
    if mode in ("rceil", "ceil"):
        assert (y.abs() <= info.max * s * (1 + relative_error)).all()
    half = torch.maximum(info.eps / 2 * y.abs(), s * info.smallest_normal * info.eps / 2)
    bound = half * (1 + relative_error) + relative_error * y.abs()
    assert ((mx_dequantize(values, scales).double() - saturated).abs() <= bound).all()


@with_and_without_weight
@pytest.mark.parametrize("p", [1, 2, 3.7])
@all_inputs
@all_elements
@all_modes
def test_mxnorm_cast_rounds_only_to_the_element(
    mode: ScaleMode, elem_dtype: torch.dtype, dtype: torch.dtype, p: float, weighted: bool
) -> None:
    x = normal(64, WIDTH, dtype=dtype)
    x[:16, 40] *= 100
    x[16:32] *= torch.exp2(torch.arange(-12, 4)).to(dtype)[:, None]
    weight = gain(dtype=dtype, low=-1.5) if weighted else None
    values, scales, rho = mxnorm_cast(
        x, weight, eps=EPS, p=p, elem_dtype=elem_dtype, scale_mode=mode
    )
    rho64 = inverse_rms64(x, p, EPS)
    error = estimate_error(p)
    torch.testing.assert_close(rho.double(), rho64, rtol=error, atol=0)
    y = x.double() * rho64
    if weight is not None:
        y = y * weight.double()
    # rho, and the two products x rho w.
    assert_within_half_an_ulp(values, scales, y, error + 2 * U, mode)

    # Rounding to nearest is monotone: absmax times rho is the absmax of the products.
    product = x.float() * rho if weight is None else (x.float() * weight.float()) * rho
    y32_values, y32_scales = mx_cast(product, elem_dtype=elem_dtype, scale_mode=mode)
    assert_bits_equal(scales, y32_scales)
    assert_bits_equal(values, y32_values)


@all_inputs
@pytest.mark.parametrize("p", [1, 2, 3.7])
def test_mxnorm_cast_without_a_gain_is_the_cast_of_mxnorm(p: float, dtype: torch.dtype) -> None:
    x = normal(64, WIDTH, dtype=dtype)
    values, scales, rho = mxnorm_cast(x, eps=EPS, p=p)
    expected = mx_cast(mxnorm(x, eps=EPS, p=p, out_dtype=torch.float32))
    assert_bits_equal(values, expected[0])
    assert_bits_equal(scales, expected[1])
    assert_bits_equal(rho, inverse_rms(x, eps=EPS, p=p))


def test_mxnorm_cast_ignores_the_roundings_of_the_norm() -> None:
    x, weight = normal(8, WIDTH).bfloat16(), gain().bfloat16()
    plain = mxnorm_cast(x, weight, eps=EPS)
    rounded = mxnorm_cast(x, weight, eps=EPS, norm_dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    for a, b in zip(plain, rounded, strict=True):
        assert_bits_equal(a, b)


def assert_same_specials(
    x: Tensor, weight: Tensor | None, p: float, elem_dtype: torch.dtype, mode: ScaleMode
) -> None:
    cast: dict[str, Any] = {"elem_dtype": elem_dtype, "scale_mode": mode}
    values, scales, _ = mxnorm_cast(x, weight, eps=EPS, p=p, **cast)
    actual = mx_dequantize(values, scales)
    exact = mxnorm(x, weight, eps=EPS, estimator="exact", norm_dtype=x.dtype)
    expected = mx_dequantize(*mx_cast(exact, **cast))
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("p", [1, 2, 3.7])
@all_inputs
@all_edges
def test_specials_are_those_of_the_exact_norm(case: EdgeCase, dtype: torch.dtype, p: float) -> None:
    x = case.x(dtype)
    shrinking = gain(x.shape[-1], dtype, low=0.25, high=1.0)
    for mode in SCALE_MODES:
        for elem_dtype in (E4M3, E5M2):
            assert_same_specials(x, None, p, elem_dtype, mode)
            assert_same_specials(x, shrinking, p, elem_dtype, mode)


GROWING_OVERFLOWS = {
    "largest_finite",
    "powers_of_two",
    "around_powers_of_two",
    "around_largest_element",
    "around_even_rounding",
}


@pytest.mark.parametrize("p", [1, 2, 3.7])
@all_inputs
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=pytest.mark.xfail(
                strict=True, reason="x * weight overflows before rho = 0 is applied: inf * 0 = NaN"
            ),
        )
        if case.name in GROWING_OVERFLOWS
        else case
        for case in EDGE_CASES
    ],
    ids=str,
)
def test_specials_are_those_of_the_exact_norm_with_large_gains(
    case: EdgeCase, dtype: torch.dtype, p: float
) -> None:
    x = case.x(dtype)
    growing = gain(x.shape[-1], dtype, low=4.0, high=8.0)
    assert_same_specials(x, growing, p, E4M3, "rceil")


# --- mx_linear ------------------------------------------------------------------------------


@with_and_without_weight
@all_inputs
@all_elements
@all_modes
def test_linear_is_linear_on_dequantised_operands(
    mode: ScaleMode, elem_dtype: torch.dtype, dtype: torch.dtype, weighted: bool
) -> None:
    options: dict[str, Any] = {"elem_dtype": elem_dtype, "scale_mode": mode}
    x, weight = normal(2, 5, WIDTH, dtype=dtype), normal(24, WIDTH, seed=1, dtype=dtype)
    bias = normal(24, seed=2, dtype=dtype) if weighted else None
    w = mx_dequantize(*mx_cast(weight, **options), dtype)
    expected = F.linear(mx_dequantize(*mx_cast(x, **options), dtype), w, bias)
    assert_bits_equal(mx_linear(x, weight, bias, **options), expected)

    values, scales, _ = mxnorm_cast(x, eps=EPS, **options)
    expected = F.linear(mx_dequantize(values, scales, dtype), w, bias)
    actual = mx_linear(x, weight, bias, quantized=(values, scales), **options)
    assert_bits_equal(actual, expected)


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16], ids=["g32", "g16"])
@all_inputs
@all_modes
def test_linear_folds_the_gain_in_float32(
    mode: ScaleMode, dtype: torch.dtype, gain_dtype: torch.dtype
) -> None:
    x, weight = normal(5, WIDTH, dtype=dtype), normal(24, WIDTH, seed=1, dtype=dtype)
    scale = gain(dtype=gain_dtype)
    values, scales, rho = mxnorm_cast(x, eps=EPS, scale_mode=mode)
    folded = mx_cast(weight.float() * scale.float(), scale_mode=mode)
    expected = F.linear(mx_dequantize(values, scales, dtype), mx_dequantize(*folded, dtype))
    y = mxnorm(x, scale, eps=EPS)
    actual = mx_linear(y, weight, quantized=(values, scales), gain=scale, scale_mode=mode)
    assert_bits_equal(actual, expected)


@with_and_without_weight
@pytest.mark.parametrize("fold", [False, True])
@all_inputs
def test_linear_gradients_are_straight_through(
    dtype: torch.dtype, fold: bool, weighted: bool
) -> None:
    x = normal(2, 5, WIDTH, dtype=dtype).requires_grad_()
    weight = normal(24, WIDTH, seed=1, dtype=dtype).requires_grad_()
    bias = normal(24, seed=2, dtype=dtype).requires_grad_() if weighted else None
    grad = normal(2, 5, 24, seed=3, dtype=dtype)
    leaves = [x, weight] if bias is None else [x, weight, bias]
    scale = gain(dtype=dtype) if fold else None
    actual = torch.autograd.grad(mx_linear(x, weight, bias, gain=scale), leaves, grad)
    expected = torch.autograd.grad(F.linear(x, weight, bias), leaves, grad)
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_gradient_reaches_through_norm_and_linear() -> None:
    # What the rewritten graph computes: casts forward, the high-precision chain backward.
    x = normal(6, WIDTH).requires_grad_()
    scale, weight = gain().requires_grad_(), normal(24, WIDTH, seed=1).requires_grad_()
    grad = normal(6, 24, seed=2)
    y = mxnorm(x, scale, eps=EPS)
    quantized = mxnorm_cast(x, scale, eps=EPS)[:2]
    actual = torch.autograd.grad(
        mx_linear(y, weight, quantized=quantized), [x, scale, weight], grad
    )
    expected = torch.autograd.grad(
        F.linear(mxnorm(x, scale, eps=EPS), weight), [x, scale, weight], grad
    )
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


# --- equivariance ---------------------------------------------------------------------------


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    k=st.integers(-30, 30),
    p=st.sampled_from([0.5, 1, 2, 3.7]),
    estimator=st.sampled_from(["mxnorm", "exact"]),
    mode=st.sampled_from(SCALE_MODES),
    seed=st.integers(0, 2**16),
)
def test_scaling_by_a_power_of_two_changes_no_bit(
    k: int, p: float, estimator: Estimator, mode: ScaleMode, seed: int
) -> None:
    # Multiplying by 2^k commutes with every rounding while nothing leaves the normal range: with
    # 2^-30 <= |x| <= 2^4 or x = 0, the squares stay between 2^-120 and 2^68.
    x = normal(3, WIDTH, seed=seed)
    x = torch.where(x.abs() < 2.0**-30, 0.0, x)
    assert x.abs().max() < 16
    options: dict[str, Any] = {"eps": 0.0, "p": p, "estimator": estimator}
    assert_bits_equal(mxnorm(x * 2.0**k, **options), mxnorm(x, **options))
    scaled = mxnorm_cast(x * 2.0**k, scale_mode=mode, **options)
    plain = mxnorm_cast(x, scale_mode=mode, **options)
    assert_bits_equal(scaled[0], plain[0])
    assert_bits_equal(scaled[1], plain[1])
    assert_bits_equal(scaled[2] * 2.0**k, plain[2])
