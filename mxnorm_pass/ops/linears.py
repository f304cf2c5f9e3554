"""The op of a linear whose backward a recipe may cast, and that of its backward's matmuls.

``linear`` is there for autograd, which makes of it two matmuls that know whose they are; in the
graph that is rewritten it is opened again. What ``recipe_matmul`` casts is written into it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.numerics import matmul as numerics
from mxnorm_pass.numerics.checks import check_choice
from mxnorm_pass.numerics.philox import Matmul
from mxnorm_pass.numerics.recipe import MatmulRecipe
from mxnorm_pass.numerics.recipe_text import PLAIN, recipe_of_text
from mxnorm_pass.ops.define import Op, define, register_derivative
from mxnorm_pass.ops.operands import draw_of, read_operand


def _recipe_matmul(
    left: Tensor,
    right: Tensor,
    seed: Tensor | None,
    key: int,
    right_key: int,
    matmul: Matmul,
    recipe: str,
) -> Tensor:
    plan = _checked(left, right, matmul, recipe)
    if plan.is_random and seed is None:
        raise ValueError(f"recipe_matmul: {recipe} is random and needs a seed")
    draw = draw_of(left.device, seed, key, right_key, matmul)
    return numerics.recipe_matmul(left, right, plan, draw, matmul=matmul)


def written_matmul(
    left: Tensor,
    right: Tensor,
    seed: Tensor | None,
    key: int,
    right_key: int,
    matmul: Matmul,
    recipe: str,
) -> Tensor:
    """``recipe_matmul`` by the ops that cast and widen each of its operands."""
    plan = _checked(left, right, matmul, recipe)
    read = partial(read_operand, seed, key, right_key)
    return numerics.recipe_matmul(left, right, plan, None, matmul=matmul, read=read)


def _fake_recipe_matmul(
    left: Tensor,
    right: Tensor,
    seed: Tensor | None,
    key: int,
    right_key: int,
    matmul: Matmul,
    recipe: str,
) -> Tensor:
    _checked(left, right, matmul, recipe)
    return right.new_empty((left.shape[0], right.shape[0]))


def _checked(left: Tensor, right: Tensor, matmul: str, recipe: str) -> Any:
    check_choice("matmul", matmul, ("forward", "dgrad", "wgrad"))
    if left.ndim != 2 or right.ndim != 2:
        raise ValueError(
            f"recipe_matmul: left has shape {tuple(left.shape)} and right {tuple(right.shape)}; "
            "they must be [M, C] and [R, C]"
        )
    return recipe_of_text(recipe)


def _stays_whole(args: Sequence[Any]) -> bool:
    """What is not written as ops: see :func:`is_writable`, and ``operands``."""
    left, *_, recipe = args
    plan = recipe_of_text(recipe)
    return left.device.type == "cpu" or plan.is_random or not is_writable(left.shape[-1], plan)


def is_writable(contraction: Any, recipe: MatmulRecipe) -> bool:
    """Is there an op for what becomes of each operand?

    What is padded depends on the size of the contraction, which each call alone may know.
    """
    casts = (recipe.left.format, recipe.right.format)
    return not isinstance(contraction, torch.SymInt) and (recipe.hadamard is None or all(casts))


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    key: int,
    input_key: int,
) -> Tensor:
    # As a matrix: of one that requires no gradient, as in the graph, F.linear makes batches.
    y = F.linear(_as_matrix(x), weight, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _as_matrix(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    key: int,
    input_key: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


recipe_matmul = define(
    Op(
        "recipe_matmul(Tensor left, Tensor right, Tensor? seed, int key, int right_key, "
        "str matmul, str recipe) -> Tensor",
        _recipe_matmul,
        _fake_recipe_matmul,
        traffic="library",
        stays_whole=_stays_whole,
    )
)
linear = define(
    Op(
        "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? seed, int key, int input_key) "
        "-> Tensor",
        _linear,
        _fake_linear,
        traffic="library",
        differentiable=True,
    )
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, seed, ctx.key, ctx.input_key = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    ctx.x_shape = x.shape
    # What is saved must not change until then, be it read or not.
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, seed)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, seed = ctx.saved_tensors
    rows = _as_matrix(grad)
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        keys = (ctx.key, ctx.key)
        dgrad = recipe_matmul(rows, weight.t(), seed, *keys, "dgrad", PLAIN)
        grad_x = dgrad.reshape(ctx.x_shape)
    if needs_weight:
        keys, columns = (ctx.key, ctx.input_key), _as_matrix(x).t()
        grad_weight = recipe_matmul(rows.t(), columns, seed, *keys, "wgrad", PLAIN)
    if needs_bias:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias, None, None, None


register_derivative(linear, _differentiate, _save_for_backward)
