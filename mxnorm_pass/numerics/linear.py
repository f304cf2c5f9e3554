"""A linear on MX operands."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.numerics.cast import dequantize_blocks, mx_cast
from mxnorm_pass.numerics.formats import CastMode


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
