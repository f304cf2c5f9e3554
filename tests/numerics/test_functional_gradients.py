"""Gradients of the eager norm: against differences, formulas in float64 and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edge_cases import BLOCK_SIZE, WIDTH
from numerics import (
    BLOCKS,
    EPS,
    U64,
    U,
    all_gradients,
    assert_bits_equal,
    estimate_error,
    gain,
    gradients,
    inverse_rms64,
    normal,
    rms_estimate64,
    separated,
    with_and_without_weight,
)
from torch import Tensor

from mxnorm_pass.functional import rms_constant
from mxnorm_pass.numerics.norm import Gradient, inverse_rms, mxnorm, mxnorm_vjp
from mxnorm_pass.numerics.rms import Estimator


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
