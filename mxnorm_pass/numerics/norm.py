"""RMSNorm with an exact or estimated RMS, and its derivative."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mxnorm_pass.numerics.checks import check_choice
from mxnorm_pass.numerics.rms import Estimator, compute_dtype, mean_square, mean_square_vjp


def inverse_rms_vjp(
    x: Tensor,
    rho: Tensor,
    grad_rho: Tensor,
    *,
    eps: float,
    estimator: Estimator = "mxnorm",
    gradient: Gradient = "true",
    p: float = 2.0,
    block_size: int = 32,
    block_weights: Tensor | None = None,
) -> Tensor:
    """Contribution of the (estimated) inverse RMS to the gradient of ``x``.

    Args:
        x: [..., D], float32 or float64.
        rho: [..., 1], the inverse RMS that the forward used.
        grad_rho: [..., 1], its cotangent, sum_i g_i x_i.
        gradient: "true", the derivative of the estimate itself; "orthogonal",
            -rho~ rho^2 x / D with the exact rho, which keeps dx orthogonal to x;
            "paper", -rho~^3 x / D, RMSNorm's derivative with rho~ in place of rho.

    Returns:
        [..., D], ``grad_rho * d rho / d x``.
    """
    check_choice("gradient", gradient, get_args(Gradient))
    if gradient == "true" or estimator == "exact":
        grad_square = grad_rho * (-0.5 * rho.pow(3))
        return mean_square_vjp(x, grad_square, estimator, p, block_size, block_weights)
    width = x.shape[-1]
    if gradient == "orthogonal":
        exact_rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return x * (-rho * exact_rho.square() * grad_rho / width)
    return x * (-rho.pow(3) * grad_rho / width)


class _InverseRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        names = ("estimator", "p", "block_size", "block_weights")
        rho = torch.rsqrt(mean_square(x, *(options[n] for n in names)) + options["eps"])
        ctx.save_for_backward(x, rho)
        ctx.options = options
        return rho

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, rho = ctx.saved_tensors
        return inverse_rms_vjp(x, rho, grads[0], **ctx.options), None


def inverse_rms(
    x: Tensor,
    *,
    eps: float,
    estimator: Estimator = "mxnorm",
    gradient: Gradient = "true",
    p: float = 2.0,
    block_size: int = 32,
    block_weights: Tensor | None = None,
) -> Tensor:
    """1 / sqrt(rms~^2 + eps) of each row; a zero row stays finite, as in RMSNorm.

    Args:
        x: [..., D], floating point; D divisible by ``block_size`` unless ``estimator="exact"``.
        estimator: "mxnorm" (block absmaxes) or "exact" (mean of squares).
        gradient: see :func:`inverse_rms_vjp`.
        block_weights: see :func:`rms_estimate`.

    Returns:
        [..., 1], float32 (float64 for float64 input), differentiable once.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    check_choice("gradient", gradient, get_args(Gradient))
    options = {
        "eps": eps, "estimator": estimator, "gradient": gradient, "p": p, "block_size": block_size,
        "block_weights": block_weights,
    }  # fmt: skip
    rho: Tensor = _InverseRMS.apply(x.to(compute_dtype(x)), options)  # type: ignore[no-untyped-call]
    return rho


def normalize(
    x: Tensor,
    rho: Tensor,
    weight: Tensor | None,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x * rho * weight, rounded where the norm rounds; the arguments are those of `mxnorm`."""
    normalized = x.to(compute_dtype(x)) * rho
    if norm_dtype is not None:
        normalized = normalized.to(norm_dtype)
    if weight is not None:
        normalized = normalized * weight
    return normalized.to(out_dtype)


def mxnorm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    p: float = 2.0,
    block_size: int = 32,
    block_weights: Tensor | None = None,
    estimator: Estimator = "mxnorm",
    gradient: Gradient = "true",
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm with the RMS estimated from block absmaxes; high-precision output.

    Args:
        x: [..., D], floating point.
        weight: [D], the gain; None for a norm without one.
        eps: added to the mean square.
        block_weights: see :func:`rms_estimate`.
        norm_dtype: dtype to which x / rms is rounded before the gain (HuggingFace's RMSNorm
            rounds to the input's dtype there); None keeps float32.
        out_dtype: dtype of the result; None: that of ``x``.

    Returns:
        [..., D]; differentiable once in ``x`` and ``weight``.
    """
    # One upcast for both uses, so that their gradients are added before they are rounded.
    x32 = x.to(compute_dtype(x))
    rho = inverse_rms(
        x32,
        eps=eps,
        estimator=estimator,
        gradient=gradient,
        p=p,
        block_size=block_size,
        block_weights=block_weights,
    )
    return normalize(x32, rho, weight, norm_dtype, out_dtype or x.dtype)


def mxnorm_vjp(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rho: Tensor,
    *,
    eps: float,
    p: float = 2.0,
    block_size: int = 32,
    block_weights: Tensor | None = None,
    estimator: Estimator = "mxnorm",
    gradient: Gradient = "true",
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Backward of :func:`mxnorm` from the saved ``x`` and ``rho``.

    Args:
        grad: [..., D], cotangent of the norm's output.
        rho: [..., 1], the inverse RMS that the forward computed.

    Returns:
        Gradients of ``x`` (its shape and dtype) and of ``weight`` (None without one).
    """
    with torch.enable_grad():
        x_leaf = x.detach().to(compute_dtype(x)).requires_grad_()
        rho_leaf = rho.detach().requires_grad_()
        leaves = [x_leaf, rho_leaf]
        weight_leaf = None
        if weight is not None:
            weight_leaf = weight.detach().requires_grad_()
            leaves.append(weight_leaf)
        y = normalize(x_leaf, rho_leaf, weight_leaf, norm_dtype, out_dtype or x.dtype)
        grads = torch.autograd.grad(y, leaves, grad)
    through_rho = inverse_rms_vjp(
        x_leaf.detach(),
        rho,
        grads[1],
        eps=eps,
        estimator=estimator,
        gradient=gradient,
        p=p,
        block_size=block_size,
        block_weights=block_weights,
    )
    grad_x = (grads[0] + through_rho).to(x.dtype)
    return grad_x, grads[2] if weight is not None else None


Gradient = Literal["true", "orthogonal", "paper"]
