"""The op of the estimate alone, which autograd differentiates, and that of its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.numerics.norm import Gradient, inverse_rms_vjp
from mxnorm_pass.numerics.rms import mean_square
from mxnorm_pass.ops.checks import check_inverse_rms
from mxnorm_pass.ops.define import Op, define, register_derivative


def _inverse_rms(
    x: Tensor,
    block_weights: list[float] | None,
    eps: float,
    p: float,
    block_size: int,
    gradient: Gradient,
) -> Tensor:
    check_inverse_rms(x, block_weights, p, block_size, gradient)
    square = mean_square(x.contiguous(), "mxnorm", p, block_size, _weights(block_weights, x))
    return torch.rsqrt(square + eps)


def _inverse_rms_backward(
    grad: Tensor,
    x: Tensor,
    rho: Tensor,
    block_weights: list[float] | None,
    eps: float,
    p: float,
    block_size: int,
    gradient: Gradient,
) -> Tensor:
    check_inverse_rms(x, block_weights, p, block_size, gradient)
    return inverse_rms_vjp(
        x.contiguous(),
        rho,
        grad,
        eps=eps,
        p=p,
        block_size=block_size,
        block_weights=_weights(block_weights, x),
        gradient=gradient,
    )


def _weights(block_weights: list[float] | None, like: Tensor) -> Tensor | None:
    if block_weights is None:
        return None
    return torch.tensor(block_weights, dtype=torch.float32, device=like.device)


def _fake_inverse_rms(x: Tensor, block_weights: list[float] | None, *options: Any) -> Tensor:
    _, p, block_size, gradient = options
    check_inverse_rms(x, block_weights, p, block_size, gradient)
    return x.new_empty((*x.shape[:-1], 1))


def _fake_inverse_rms_backward(grad: Tensor, x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_ESTIMATE = "float[]? block_weights, float eps, float p, int block_size, str gradient"
inverse_rms_backward = define(
    Op(
        f"inverse_rms_backward(Tensor grad, Tensor x, Tensor rho, {_ESTIMATE}) -> Tensor",
        _inverse_rms_backward,
        _fake_inverse_rms_backward,
    )
)
inverse_rms = define(
    Op(
        f"inverse_rms(Tensor x, {_ESTIMATE}) -> Tensor",
        _inverse_rms,
        _fake_inverse_rms,
        differentiable=True,
    )
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, rho = ctx.saved_tensors
    return inverse_rms_backward(grad, x, rho, *ctx.options), *(None for _ in ctx.options)


register_derivative(inverse_rms, _differentiate, _save_for_backward)
