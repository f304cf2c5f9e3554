"""A linear whose matmuls read cast operands: the forward alone, or all three of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.numerics.cast import Quantized
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.matmul import recipe_matmul
from mxnorm_pass.numerics.parse_recipe import recipe as recipe_of
from mxnorm_pass.numerics.philox import Draw, Matmul
from mxnorm_pass.numerics.recipe import Recipe, in_format
from mxnorm_pass.numerics.seed import draw_seed


@dataclass(frozen=True, eq=False)
class _Forward:
    """What the forward reads in the place of x and weight, which the backward reads.

    Attributes:
        input: the cast of x, or None to make it.
        weight: [N, K], with the gain folded in.
    """

    input: Quantized | None
    weight: Tensor


@dataclass(frozen=True, eq=False)
class _Seeds:
    """Of a linear, and of what wgrad draws of its input; None where nothing is random."""

    own: Tensor | None
    input: Tensor | None

    def draw(self, matmul: Matmul) -> Draw | None:
        if self.own is None:
            return None
        return Draw(self.own, matmul, self.input if matmul == "wgrad" else None)


class _RecipeLinear(torch.autograd.Function):
    """Each matmul from its own casts of the high-precision tensors, straight through the casts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seeds: _Seeds,
        recipe: Recipe,
        reads: _Forward,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, seeds.own, seeds.input)
        ctx.recipe, ctx.has_bias = recipe, bias is not None
        left = _as_matrix(x) if reads.input is None else reads.input
        draw = seeds.draw("forward")
        y = recipe_matmul(left, reads.weight, recipe.forward, draw, bias=bias, dtype=weight.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, *saved = ctx.saved_tensors
        seeds = _Seeds(*saved)
        grad, recipe = _as_matrix(grads[0]), ctx.recipe
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            dgrad = recipe_matmul(grad, weight.t(), recipe.dgrad, seeds.draw("dgrad"))
            grad_x = dgrad.reshape(x.shape)
        if ctx.needs_input_grad[1]:
            draw = seeds.draw("wgrad")
            grad_weight = recipe_matmul(grad.t(), _as_matrix(x).t(), recipe.wgrad, draw)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def recipe_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: Recipe | str | Mapping[str, Any],
    seed: Tensor | None = None,
    input_seed: Tensor | None = None,
    quantized: tuple[Tensor, ...] | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Linear layer whose three matmuls in training read operands that a recipe casts.

    A contraction that is no multiple of the blocks or of the Hadamard size, be it K, N or the
    number of tokens, is padded with zeros (see :func:`recipe_matmul`). The bias and its gradient
    stay in high precision. Under ``torch.autocast`` the casts read its dtype, as in ``F.linear``.

    Args:
        x: [..., K], the high-precision activation; float32, bfloat16 or float16.
        weight: [N, K], of x's dtype.
        bias: [N] or None.
        recipe: a :class:`Recipe`, the name of one, or a dict, see
            :func:`mxnorm_pass.functional.recipe`.
        seed: [] int64, of all that is random in this linear and step. None draws one from torch's
            generator, in the forward, whether or not a gradient is taken: so a layer that is
            recomputed in the backward repeats its draws, and two backward passes of one forward
            are equal. Under ``torch.compile`` that breaks the graph, see :func:`draw_seed`.
        input_seed: [] int64, of what wgrad draws of ``x``: its rounding, and the signs of the
            transform of both operands. Linears that read one ``x`` under one input seed share its
            cast; the rounding of their gradients stays independent. None for ``seed``.
        quantized: (values, scales) of the forward's activation where they come from somewhere
            else than ``x``, above all from :func:`mxnorm_cast`; of NVFP4 a tensor scale may follow.
        gain: [K], the norm's gain to fold into the forward's weight before its cast (McLean et al.
            2026, arXiv 2603.13180, section 3: H = MXNorm(X) MXCast(W diag gain)^T). ``x`` must then
            include the gain and ``quantized`` must not.

    Returns:
        [..., N] of x's dtype; differentiable once in x, weight and bias.

    Raises:
        ValueError: no such recipe, a seed is no [] int64, x and weight do not fit together, or
            ``quantized`` is given for a forward that casts nothing or transforms.
    """
    plan = recipe_of(recipe)
    x, weight = _in_autocast(x), _in_autocast(weight)
    bias = None if bias is None else _in_autocast(bias)
    _check_operands(x, weight)
    if plan.is_random and seed is None:
        seed = draw_seed(x.device)
    reads = _Forward(_given(quantized, plan), _folded(weight, gain))
    seeds = _Seeds(_checked_seed(seed), _checked_seed(input_seed))
    y: Tensor = _RecipeLinear.apply(x, weight, bias, seeds, plan, reads)  # type: ignore[no-untyped-call]
    return y


def _in_autocast(x: Tensor) -> Tensor:
    """What torch.autocast would hand to a linear, so that casts read what the matmul would."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _check_operands(x: Tensor, weight: Tensor) -> None:
    # The padding would hide that one of them is shorter.
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be "
            "[..., K] and [N, K]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x is of {x.dtype} and weight of {weight.dtype}; they must be of one")


def _checked_seed(seed: Tensor | None) -> Tensor | None:
    if seed is not None and (seed.shape != () or seed.dtype is not torch.int64):
        raise ValueError(
            f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype}; it must be one int64 "
            "number, of shape (), such as draw_seed() returns"
        )
    return seed


def _given(quantized: tuple[Tensor, ...] | None, recipe: Recipe) -> Quantized | None:
    if quantized is None:
        return None
    fmt = recipe.forward.left.format
    if fmt is None or recipe.forward.hadamard is not None:
        raise ValueError(
            "quantized is the activation in the format of the recipe's forward, which "
            + ("has none" if fmt is None else "transforms it first")
            + "; leave quantized out"
        )
    values, scales, *tensor_scale = quantized
    return Quantized(values, scales, fmt, *tensor_scale)


def _folded(weight: Tensor, gain: Tensor | None) -> Tensor:
    if gain is None:
        return weight.detach()
    return weight.detach().to(torch.float32) * gain.detach().to(torch.float32)


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

    It is :func:`recipe_linear` with a recipe of the forward alone.

    Args:
        x: [..., D], the high-precision activation; the backward reads it.
        weight: [N, D], the high-precision weight.
        bias: [N] or None.
        quantized: as of :func:`recipe_linear`.
        gain: as of :func:`recipe_linear`.
        format: of both operands, a :class:`BlockFormat` or the name of one. Casts to NVFP4 that
            are made here have the tensor scale of :func:`nvfp4_tensor_scale`.

    Returns:
        [..., N] of ``x``'s dtype; differentiable once in x, weight and bias.
    """
    return recipe_linear(x, weight, bias, recipe=in_format(format), quantized=quantized, gain=gain)
