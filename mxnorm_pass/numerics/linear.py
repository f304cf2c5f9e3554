"""A linear on MX operands."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.numerics.cast import Quantized, quantize_alone
from mxnorm_pass.numerics.formats import BlockFormat, block_format


class _MXLinear(torch.autograd.Function):
    """Forward from the casts; backward straight through them, in high precision."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        quantized_x: Quantized,
        quantized_weight: Quantized,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        activation = quantized_x.dequantize(x.dtype)
        return F.linear(activation, quantized_weight.dequantize(weight.dtype), bias)

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
    quantized: tuple[Tensor, ...] | None = None,
    gain: Tensor | None = None,
    format: BlockFormat | str = "mxfp8",
) -> Tensor:
    """Linear layer on MX-cast operands; the backward's matmuls stay in high precision.

    Args:
        x: [..., D], the high-precision activation; the backward reads it.
        weight: [N, D], the high-precision weight.
        bias: [N] or None.
        quantized: (values, scales) of the activation where they come from somewhere else than
            ``x``, above all from :func:`mxnorm_cast`; of NVFP4 a tensor scale may follow.
        gain: [D], the norm's gain to fold into the weight before its cast (paper, section 3:
            H = MXNorm(X) MXCast(W diag gain)^T). ``x`` must then include the gain and
            ``quantized`` must not.
        format: of both operands, a :class:`BlockFormat` or the name of one. Casts to NVFP4 that
            are made here have the tensor scale of :func:`nvfp4_tensor_scale`.

    Returns:
        [..., N] of ``x``'s dtype; differentiable once in x, weight and bias.
    """
    fmt = block_format(format)
    source = weight.detach()
    if gain is not None:
        source = source.to(torch.float32) * gain.detach().to(torch.float32)
    if quantized is None:
        activation = quantize_alone(x, fmt)
    else:
        values, scales, *tensor_scale = quantized
        activation = Quantized(values, scales, fmt, *tensor_scale)
    quantized_weight = quantize_alone(source, fmt)
    y: Tensor = _MXLinear.apply(x, weight, bias, activation, quantized_weight)  # type: ignore[no-untyped-call]
    return y
