"""Eager, differentiable reference of MXNorm and MX casts; the one definition of the math.

The graph rewrite traces these functions and grafts them in, and every kernel is tested against
them. Source: McLean et al. 2026, "MXNorm", arXiv 2603.13180; OCP Microscaling specification v1.0.

Shapes: ``T`` rows of ``D`` elements, cut into ``K = D / block_size`` blocks of ``B`` elements.
Leading dimensions are free; blocks lie along the last one.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.config import Estimator, Gradient
from mxnorm_pass.estimate import (
    block_absmax,
    blocks,
    compute_dtype,
    mean_square,
    mean_square_from_absmax,
    mean_square_vjp,
    rms_constant,
    rms_estimate,
)
from mxnorm_pass.formats import (
    MX_BLOCK_SIZE,
    CastMode,
    ScaleLayout,
    block_size_of,
    blocked_scales,
    blocked_scales_shape,
    cast_elements,
    dequantize_blocks,
    e8m0_exponent,
)

__all__ = [
    "blocked_scales",
    "inverse_rms",
    "inverse_rms_vjp",
    "mx_cast",
    "mx_dequantize",
    "mx_linear",
    "mxnorm",
    "mxnorm_cast",
    "mxnorm_cast_both",
    "mxnorm_vjp",
    "normalize",
    "rms_constant",
    "rms_estimate",
]


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


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
    _check_choice("gradient", gradient, get_args(Gradient))
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
    _check_choice("estimator", estimator, get_args(Estimator))
    _check_choice("gradient", gradient, get_args(Gradient))
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


@torch.no_grad()
def mx_cast(
    x: Tensor,
    *,
    elem_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_mode: CastMode = "rceil",
    block_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Cast to an MX format along the last dimension.

    Args:
        x: [..., D], float32, bfloat16 or float16.

    Returns:
        values [..., D] of ``elem_dtype`` and scales [..., K] of ``torch.float8_e8m0fnu``.
        Equal to torchao's ``to_mx`` bit for bit, but for the sign of NaN; its RCEIL of float32
        is "rceil-log2" (see :func:`mxnorm_pass.formats.e8m0_exponent`).
    """
    in_blocks = blocks(x, block_size)
    absmax = in_blocks.abs().amax(-1, keepdim=True).to(torch.float32)
    return _cast_blocks(x, in_blocks.to(torch.float32), absmax, elem_dtype, scale_mode)


def _cast_blocks(
    like: Tensor, in_blocks: Tensor, absmax: Tensor, elem_dtype: torch.dtype, mode: CastMode
) -> tuple[Tensor, Tensor]:
    exponent = e8m0_exponent(absmax, elem_dtype, mode)
    values = cast_elements(in_blocks, exponent, elem_dtype, mode).reshape(like.shape)
    return values, exponent.squeeze(-1).view(torch.float8_e8m0fnu)


@torch.no_grad()
def mx_dequantize(
    values: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int | None = None,
) -> Tensor:
    """values * scales in ``dtype``.

    Args:
        values: [..., D], float8.
        scales: [..., K], row-major, ``torch.float8_e8m0fnu``.
        dtype: bfloat16 holds every e4m3 value times a power of two exactly, within its range.
        block_size: None for D / K.

    Returns:
        [..., D] of ``dtype``; blocks whose scale is NaN are NaN.

    Raises:
        ValueError: the shapes do not belong together, or not to ``block_size``; or that is None
            and ``scales`` may as well be in the 128x4 layout, for blocks of 32.
    """
    inferred = block_size_of(values.shape, scales.shape)
    if block_size is None and inferred != MX_BLOCK_SIZE:
        in_mx_blocks = (*values.shape[:-1], values.shape[-1] // MX_BLOCK_SIZE)
        if scales.shape == blocked_scales_shape(in_mx_blocks):
            raise ValueError(
                f"scales of shape {tuple(scales.shape)} are row-major for blocks of {inferred}, or "
                f"in the 128x4 layout for blocks of {MX_BLOCK_SIZE}, which cannot be read here; "
                f"block_size={inferred} says that they are the first"
            )
    if block_size is not None and inferred != block_size:
        raise ValueError(f"block_size is {block_size}, but scales has one per {inferred} values")
    return dequantize_blocks(values, scales, dtype)


@torch.no_grad()
def mxnorm_cast(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    p: float = 2.0,
    block_size: int = 32,
    block_weights: Tensor | None = None,
    estimator: Estimator = "mxnorm",
    elem_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_mode: CastMode = "rceil",
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    scale_layout: ScaleLayout = "row-major",
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and MX cast in one: the op that the rewritten graph calls.

    With ``estimator="mxnorm"`` the block absmaxes of ``x`` give rho~, and rho~ x weight goes to
    ``elem_dtype`` with no rounding in between; ``norm_dtype`` and ``out_dtype`` play no part.
    Without ``weight`` the absmaxes times rho~ also give the scales.
    With "exact" the norm is rounded to ``norm_dtype`` and ``out_dtype`` as in :func:`mxnorm`,
    then cast, so that it equals the two steps bit for bit.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight: [D] or None.
        block_weights: see :func:`rms_estimate`.
        scale_layout: "row-major", or "blocked" as in :func:`blocked_scales`.

    Returns:
        values [..., D], scales [..., K] (or blocked), rho [..., 1] (float32); none carries a
        gradient.
    """
    _check_choice("estimator", estimator, get_args(Estimator))
    _check_choice("scale_layout", scale_layout, get_args(ScaleLayout))
    x32 = x.to(torch.float32)
    if estimator == "exact":
        rho = torch.rsqrt(mean_square(x32, estimator, p, block_size, block_weights) + eps)
        y = normalize(x32, rho, weight, norm_dtype, out_dtype or x.dtype)
        values, scales = mx_cast(
            y, elem_dtype=elem_dtype, scale_mode=scale_mode, block_size=block_size
        )
        return values, _lay_out(scales, scale_layout), rho
    absmax = block_absmax(x32, block_size)
    rho = torch.rsqrt(mean_square_from_absmax(absmax, p, block_size, block_weights) + eps)
    y = x32 * rho
    # |x| rho is monotonic in |x|, so without a gain the blocks' maxima are at hand.
    absmax = absmax * rho
    if weight is not None:
        y = y * weight.to(torch.float32)
        absmax = block_absmax(y, block_size)
    values, scales = _cast_blocks(
        x, blocks(y, block_size), absmax.unsqueeze(-1), elem_dtype, scale_mode
    )
    return values, _lay_out(scales, scale_layout), rho


@torch.no_grad()
def mxnorm_cast_both(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gain_in_rows: bool = True,
    elem_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_mode: CastMode = "rceil",
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    block_size: int = 32,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`mxnorm_cast` and the cast of the normalised rows along T, from one rho.

    The forward of a training step multiplies blocks along D, the weight gradient blocks along T.

    Args:
        x: [..., D]; T, the product of the leading dimensions, divisible by ``block_size``.
        gain_in_rows: does the cast along D include the gain? A folded gain does not belong there.
        options: the other keywords of :func:`mxnorm_cast`.

    Returns:
        values, scales and rho of :func:`mxnorm_cast`, then values [D, T] and scales
        [D, T / block_size] of :func:`mxnorm`'s output, gain included, in its rounding.
    """
    cast: dict[str, Any] = {
        "elem_dtype": elem_dtype, "scale_mode": scale_mode, "block_size": block_size
    }  # fmt: skip
    rounding = (norm_dtype, out_dtype or x.dtype)
    in_rows = mxnorm_cast(
        x,
        weight if gain_in_rows else None,
        norm_dtype=norm_dtype,
        out_dtype=out_dtype,
        **cast,
        **options,
    )
    y = normalize(x, in_rows[2], weight, *rounding).reshape(-1, x.shape[-1])
    return *in_rows, *mx_cast(y.t().contiguous(), **cast)


def _lay_out(scales: Tensor, layout: ScaleLayout) -> Tensor:
    if layout == "row-major":
        return scales
    return blocked_scales(scales.view(torch.uint8)).view(torch.float8_e8m0fnu)


class _MXLinear(torch.autograd.Function):
    """Forward from the casts; backward straight through them, in high precision."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        quantized_x: tuple[Tensor, Tensor],
        quantized_weight: tuple[Tensor, Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        activation = dequantize_blocks(*quantized_x, x.dtype)
        return F.linear(activation, dequantize_blocks(*quantized_weight, weight.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = (grad @ weight).reshape(x.shape)
        grad_weight = grad.t() @ x.reshape(-1, x.shape[-1])
        grad_bias = grad.sum(0) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def mx_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    quantized: tuple[Tensor, Tensor] | None = None,
    gain: Tensor | None = None,
    elem_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_mode: CastMode = "rceil",
    block_size: int = 32,
) -> Tensor:
    """Linear layer on MX-cast operands; the backward's matmuls stay in high precision.

    Args:
        x: [..., D], the high-precision activation; the backward reads it.
        weight: [N, D], the high-precision weight.
        bias: [N] or None.
        quantized: (values, scales) of the activation where they come from somewhere else than
            the cast of ``x``, above all from :func:`mxnorm_cast`.
        gain: [D], the norm's gain to fold into the weight before its cast (paper, section 3:
            H = MXNorm(X) MXCast(W diag gain)^T). ``x`` must then include the gain and
            ``quantized`` must not.

    Returns:
        [..., N] of ``x``'s dtype; differentiable once in x, weight and bias.
    """
    options: dict[str, Any] = {
        "elem_dtype": elem_dtype, "scale_mode": scale_mode, "block_size": block_size
    }  # fmt: skip
    source = weight.detach()
    if gain is not None:
        source = source.to(torch.float32) * gain.detach().to(torch.float32)
    activation = quantized if quantized is not None else mx_cast(x, **options)
    quantized_weight = mx_cast(source, **options)
    y: Tensor = _MXLinear.apply(x, weight, bias, activation, quantized_weight)  # type: ignore[no-untyped-call]
    return y
