"""The linear of a recipe: torchao's bits, what each matmul reads, where draws come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_bits_equal, gain, normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchao.prototype.moe_training.mxfp8_linear import mx_mm
from torchao.prototype.mx_formats.config import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    ScaleCalculationMode,
)
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from mxnorm_pass.functional import (
    RECIPES,
    Draw,
    Recipe,
    draw_seed,
    mx_cast,
    mx_dequantize,
    mxnorm,
    mxnorm_cast,
    recipe,
    recipe_linear,
    recipe_matmul,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
F32, BF16 = torch.float32, torch.bfloat16
all_recipes = pytest.mark.parametrize("name", RECIPES)
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
SEED = torch.tensor(7)
Linear = Callable[[Tensor, Tensor], Tensor]


def operands(dtype: torch.dtype = F32, tokens: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, T / 2, 96], weight [160, 96], grad_output."""
    x, weight = normal(2, tokens // 2, 96, dtype=dtype), normal(160, 96, seed=1, dtype=dtype)
    return x, weight, normal(2, tokens // 2, 160, seed=2, dtype=dtype)


def run(linear: Linear, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight)
    return y.detach(), *torch.autograd.grad(y, [x, weight], grad)


def assert_all_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert_bits_equal(a, b)


@both_dtypes
@pytest.mark.parametrize("name, grad_dtype", [("mxfp8", E4M3), ("mxfp8-e5m2", E5M2)])
def test_all_three_matmuls_are_torchaos(
    name: str, grad_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    def torchao(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = mx_mm.apply(
            x, weight, E4M3, E4M3, grad_dtype, 32, KernelPreference.EMULATED,
            MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH,
            ScaleCalculationMode.RCEIL, False,
        )  # fmt: skip
        return y

    tensors = operands(dtype)
    got = run(lambda x, w: recipe_linear(x, w, recipe=name), *tensors)
    assert_all_equal(got, run(torchao, *tensors))


@both_dtypes
@all_recipes
def test_each_matmul_reads_its_operands(name: str, dtype: torch.dtype) -> None:
    x, weight, grad = operands(dtype)
    got = run(lambda x, w: recipe_linear(x, w, recipe=name, seed=SEED), x, weight, grad)
    of, rows, dy = RECIPES[name], x.flatten(0, 1), grad.flatten(0, 1)
    want = (
        recipe_matmul(rows, weight, of.forward, Draw(SEED, "forward")).reshape(2, 32, 160),
        recipe_matmul(dy, weight.t(), of.dgrad, Draw(SEED, "dgrad")).reshape(x.shape),
        recipe_matmul(dy.t(), rows.t(), of.wgrad, Draw(SEED, "wgrad")),
    )
    assert_all_equal(got, want)
    exact = run(F.linear, x.double(), weight.double(), grad.double())
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).norm() < 0.3 * b.norm()


@both_dtypes
def test_high_precision_is_a_plain_linear(dtype: torch.dtype) -> None:
    x, weight, grad = operands(dtype)
    got = run(lambda x, w: recipe_linear(x, w, recipe={}), x, weight, grad)
    assert_all_equal(got, run(F.linear, x, weight, grad))


@all_recipes
def test_tokens_and_widths_that_fit_no_block(name: str) -> None:
    x, weight, grad = normal(37, 41), normal(29, 41, seed=1), normal(37, 29, seed=2)
    got = run(lambda x, w: recipe_linear(x, w, recipe=name, seed=SEED), x, weight, grad)
    exact = run(F.linear, x.double(), weight.double(), grad.double())
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape and (a.double() - b).norm() < 0.3 * b.norm()


@all_recipes
def test_no_tokens(name: str) -> None:
    x, weight, grad = torch.zeros(0, 96), normal(160, 96), torch.zeros(0, 160)
    y, dx, dw = run(lambda x, w: recipe_linear(x, w, recipe=name), x, weight, grad)
    assert (y.shape, dx.shape) == ((0, 160), (0, 96)) and not dw.any()


@all_recipes
def test_a_bias_stays_in_high_precision(name: str) -> None:
    x, weight, grad = operands()
    bias = normal(160, seed=3).requires_grad_()
    y = recipe_linear(x, weight, bias, recipe=name, seed=SEED)
    without = recipe_linear(x, weight, recipe=name, seed=SEED)
    torch.testing.assert_close(y, without + bias)
    (grad_bias,) = torch.autograd.grad(y, [bias], grad)
    assert_bits_equal(grad_bias, grad.flatten(0, 1).sum(0))


def test_a_forward_with_headroom_adds_the_bias_after_its_gain() -> None:
    backward = RECIPES["mxfp4-sr"].dgrad
    x, weight, _ = operands()
    bias = normal(160, seed=3)
    both = [
        recipe_linear(x, weight, b, recipe=Recipe(forward=backward), seed=SEED)
        for b in (bias, None)
    ]
    assert_bits_equal(both[0], both[1] + bias)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_that_nobody_needs_changes_no_other(frozen: str) -> None:
    x, weight, grad = operands()
    everything = run(
        lambda x, w: recipe_linear(x, w, recipe="mxfp4-rht-sr", seed=SEED), x, weight, grad
    )
    leaf = (weight if frozen == "x" else x).requires_grad_()
    y = recipe_linear(x, weight, recipe="mxfp4-rht-sr", seed=SEED)
    (only,) = torch.autograd.grad(y, [leaf], grad)
    assert_bits_equal(only, everything[2 if frozen == "x" else 1])


def test_a_norms_cast_stands_in_for_the_forwards() -> None:
    x, weight, grad = operands(BF16)
    scale = gain(96, BF16)
    y, quantized = mxnorm(x, scale, eps=1e-6), mxnorm_cast(x, eps=1e-6, format="mxfp8")[:2]
    got = run(
        lambda y, w: recipe_linear(y, w, recipe="mxfp8", quantized=quantized, gain=scale),
        y, weight, grad,
    )  # fmt: skip
    folded = mx_cast(weight.float() * scale.float(), "mxfp8")
    want = F.linear(mx_dequantize(*quantized, BF16), mx_dequantize(*folded, BF16))
    assert_bits_equal(got[0], want)
    plain = run(lambda y, w: recipe_linear(y, w, recipe="mxfp8"), y, weight, grad)
    assert_all_equal(got[1:], plain[1:])


def seeded(linear: Linear, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return run(linear, *operands())


@pytest.mark.parametrize("name", [name for name, r in RECIPES.items() if r.is_random])
def test_manual_seed_repeats_and_every_call_draws_anew(name: str) -> None:
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return recipe_linear(x, weight, recipe=name)

    once = seeded(linear, 1)
    next_step = run(linear, *operands())
    assert_all_equal(seeded(linear, 1), once)
    for other in (next_step, seeded(linear, 2)):
        assert not torch.equal(other[2], once[2])
    torch.manual_seed(1)
    seed = draw_seed()
    assert_all_equal(
        run(lambda x, w: recipe_linear(x, w, recipe=name, seed=seed), *operands()), once
    )


def test_what_is_not_random_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    run(lambda x, w: recipe_linear(x, w, recipe="mxfp4"), *operands())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mxfp4-rht-sr", "nvfp4"])
def test_a_checkpointed_layer_repeats_its_draws(name: str, reentrant: bool) -> None:
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        hidden = recipe_linear(x, weight, recipe=name).relu()
        return recipe_linear(F.dropout(hidden, 0.5), weight.t(), recipe=name)

    def checkpointed(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = checkpoint(layer, x, weight, use_reentrant=reentrant)
        return y

    def gradients(model: Linear) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        x, weight = (t.requires_grad_() for t in operands()[:2])
        model(x, weight).square().sum().backward()
        assert x.grad is not None and weight.grad is not None
        # What follows draws the same, too.
        return x.grad, weight.grad, torch.rand(1)

    assert_all_equal(gradients(checkpointed), gradients(layer))


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("name", ["mxfp4-rht", "mxfp4-rht-sr"])
def test_a_compiled_linear_draws_the_same(name: str, given: bool) -> None:
    """Its backward must not draw another seed: then the operands' transforms do not cancel."""
    options: dict[str, Any] = {"recipe": name, "seed": SEED if given else None}

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return recipe_linear(x, weight, **options)

    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=given)
    assert_all_equal(seeded(compiled, 1), seeded(linear, 1))


@pytest.mark.full
def test_inductor_draws_the_same() -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"recipe": "mxfp4-rht-sr", "seed": SEED}
    compiled = torch.compile(recipe_linear, fullgraph=True)
    got = run(lambda x, w: compiled(x, w, **options), *operands())
    want = run(lambda x, w: recipe_linear(x, w, **options), *operands())
    # A matmul may sum in another order; other words would differ by 0.2.
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def test_autocast_hands_the_casts_its_dtype() -> None:
    x, weight, grad = operands()
    with torch.autocast("cpu", BF16):
        got = run(lambda x, w: recipe_linear(x, w, recipe="mxfp8"), x, weight, grad.to(BF16))
    want = run(
        lambda x, w: recipe_linear(x, w, recipe="mxfp8"),
        x.to(BF16), weight.to(BF16), grad.to(BF16),
    )  # fmt: skip
    assert_all_equal(got, (want[0], *(g.float() for g in want[1:])))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"recipe": "mxfp5"}, "recipe is 'mxfp5'"),
    ({"weight": normal(160, 95)}, r"x has shape \(2, 32, 96\) and weight \(160, 95\)"),
    ({"weight": normal(96)}, r"they must be \[..., K\] and \[N, K\]"),
    ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
    ({"weight": normal(160, 96).bfloat16()}, "x is of torch.float32 and weight of torch.bfloat16"),
    ({"seed": torch.tensor(1.0)}, r"seed has shape \(\) and dtype torch.float32; .* draw_seed"),
    ({"seed": torch.tensor([1])}, r"seed has shape \(1,\)"),
    ({"recipe": "mxfp4", "quantized": ()}, "format of the recipe's forward, which has none"),
    (
        {"recipe": {"forward": {"format": "mxfp8", "hadamard": 32}}, "quantized": ()},
        "which transforms it first; leave quantized out",
    ),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message for _, message in BAD])
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    x, weight, _ = operands()
    with pytest.raises(ValueError, match=message):
        recipe_linear(**{"x": x, "weight": weight, "recipe": "mxfp4-sr", **arguments})


def test_a_base_with_another_forward() -> None:
    """What a user writes for RMSNorm's casts in the forward and another backward."""
    mixed = recipe({"base": "mxfp4-rht-sr", "forward": "mxfp8"})
    x, weight, grad = operands()
    got = run(lambda x, w: recipe_linear(x, w, recipe=mixed, seed=SEED), x, weight, grad)
    forward = run(lambda x, w: recipe_linear(x, w, recipe="mxfp8"), x, weight, grad)
    backward = run(
        lambda x, w: recipe_linear(x, w, recipe="mxfp4-rht-sr", seed=SEED), x, weight, grad
    )
    assert_all_equal(got, (forward[0], *backward[1:]))
