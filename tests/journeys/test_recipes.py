"""Llamas in training whose three matmuls per linear are cast as a recipe says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import some
from reference import Recipe, build_llama, reference_of
from torch import Tensor, nn
from training import (
    IDS,
    Gradients,
    assert_gradients_equal,
    flat,
    gradients_of,
    relative_error,
    train,
    worst_gradient,
)

import mxnorm_pass
from mxnorm_pass import functional
from mxnorm_pass.numerics.seed import draw_seed, linear_key

RECIPES: dict[str, Any] = {
    "mxfp8": "mxfp8",
    "mxfp8-e5m2": "mxfp8-e5m2",
    "mxfp4": "mxfp4",
    "mxfp4-sr": "mxfp4-sr",
    "mxfp4-rht": "mxfp4-rht",
    "mxfp4-rht-sr": "mxfp4-rht-sr",
    "all of mxfp4-rht-sr": {"base": "mxfp4-rht-sr", "forward": "mxfp8"},
    "nvfp4": "nvfp4",
    "nvfp4, weights in rows": {"base": "nvfp4", "forward": "nvfp4"},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RANDOM = "all of mxfp4-rht-sr"
ALONG_T = [
    pytest.param("mxfp8", torch.bfloat16, id="mxfp8"),
    pytest.param(RECIPES[RANDOM], torch.float32, id=RANDOM),
    pytest.param({"base": "mxfp4", "forward": "mxfp8"}, torch.bfloat16, marks=pytest.mark.full),
]
MANY_IDS = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(7))


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


def stepped(
    model: Callable[..., Any], parameters: nn.Module, seed: int
) -> tuple[Tensor, Gradients]:
    torch.manual_seed(seed)
    return train(model, parameters)


def reference_for(model: Any, recipe: Any, *, seed: int = 0, **more: Any) -> nn.Module:
    """The functional model, with the seed that a compiled one draws."""
    torch.manual_seed(seed)
    forward = functional.recipe(recipe).forward.left.format
    if forward is not None:
        name = forward.name if forward.has_e8m0_scales else "nvfp4"
        more |= {"cast": {"format": name}, "norm": {"block_size": forward.block_size}}
    return reference_of(model, Recipe(training=recipe, seed=draw_seed(), **more))


@some(
    ["mxfp8-bf16-True", "mxfp4-rht-sr-fp32-False", f"{RANDOM}-bf16-True", "nvfp4-bf16-False"],
    recipe=RECIPES,
    dtype=DTYPES,
    every_linear=[True, False],
)
def test_losses_and_gradients_are_those_of_functional(
    recipe: Any, dtype: torch.dtype, every_linear: bool
) -> None:
    model = build_llama(dtype, layers=1)
    reference = reference_for(model, recipe, seed=3, every_linear=every_linear)
    want, want_gradients = train(reference, reference)
    quantize = "all" if every_linear else "norm-fed"
    with mxnorm_pass.record() as report:
        fast = compiled(model, recipe=recipe, quantize=quantize)
        got, gradients = stepped(fast, model, seed=3)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    casts = functional.recipe(recipe).forward.left.format is not None
    assert len(report.fused) == (2 if casts else 0)
    plain, plain_gradients = train(model, model)
    assert worst_gradient(gradients, plain_gradients)[1] > 0.01


@pytest.mark.parametrize("recipe, dtype", ALONG_T)
def test_a_norms_op_casts_along_t_as_its_recipe_says(recipe: Any, dtype: torch.dtype) -> None:
    """Where tokens are whole blocks and pieces of the transform; one op for all who read a norm."""
    model = build_llama(dtype, layers=1)
    reference = reference_for(model, recipe, seed=3)
    want, want_gradients = train(reference, reference, MANY_IDS)
    with mxnorm_pass.record() as report:
        fast = compiled(model, recipe=recipe)
        torch.manual_seed(3)
        got, gradients = train(fast, model, MANY_IDS)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    calls = Counter(report.graphs[0].ops_after)
    assert calls["mxnorm_pass.norm_cast_both.default"] == 1
    assert calls["mxnorm_pass.add_norm_cast_both.default"] == 1
    # Each of five linears has a gradient and a weight, and no input, left to cast.
    casts = calls["mxnorm_pass.operand_cast.default"] + calls["mxnorm_pass.cast.default"]
    forward_weights = 5
    assert casts == 5 * 3 + forward_weights


def test_seeds() -> None:
    """One repeats, two differ, and so do two steps and two calls of one linear."""
    model = build_llama(layers=1)
    fast = compiled(model, recipe=RANDOM_RECIPE)
    first, again, other = (stepped(fast, model, seed)[1] for seed in (0, 0, 1))
    assert_gradients_equal(first, again)
    assert not torch.equal(flat(first), flat(other))
    _, next_step = train(fast, model)
    assert not torch.equal(flat(next_step), flat(other))


RANDOM_RECIPE = RECIPES[RANDOM]


@pytest.mark.parametrize("reentrant", [False])
def test_a_checkpointed_layer_is_the_same(reentrant: bool) -> None:
    model = build_llama(layers=2)
    want, want_gradients = stepped(compiled(model, recipe=RANDOM_RECIPE), model, seed=0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got, gradients = stepped(compiled(model.train(), recipe=RANDOM_RECIPE), model, seed=0)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


class TwoCalls(nn.Module):
    """One linear, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x))


def test_calls_of_one_linear_draw_anew() -> None:
    model = TwoCalls()
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    fast = compiled(model, recipe="mxfp4-sr", quantize="all")
    fast(x).sum().backward()
    seed_of = torch.manual_seed(0) and draw_seed()
    weight = model.linear.weight.detach().clone().requires_grad_()
    y = x
    for call in (0, 1):
        seed = seed_of + linear_key("linear", call)
        y = functional.recipe_linear(y, weight, recipe="mxfp4-sr", seed=seed)
    y.sum().backward()
    assert torch.equal(model.linear.weight.grad, weight.grad)


def test_modules_choose_their_recipe() -> None:
    model = build_llama(layers=1)
    want = stepped(compiled(model, recipe="mxfp8"), model, seed=0)[1]
    # All have the same forward.
    rules = {"*mlp.gate_proj": {"recipe": "mxfp8-e5m2"}, "*mlp.up_proj": {"recipe": None}}
    got = stepped(compiled(model, recipe="mxfp8", modules=rules), model, seed=0)[1]
    layer = "model.layers.0."
    differing = {name for name in want if not torch.equal(want[name], got[name])}
    assert {f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"} <= differing
    assert f"{layer}mlp.down_proj.weight" not in differing


def test_the_report_says_what_each_linear_reads() -> None:
    model = build_llama(layers=1)
    rules = {"*gate_proj": {"recipe": None}, "*up_proj": False}
    options = {"recipe": "mxfp4-rht-sr", "modules": rules}
    with mxnorm_pass.record() as report:
        train(compiled(model, **options), model)
    (graph,) = report.graphs
    layer, mxfp4 = "model.layers.0.", "mxfp4 e2m1 floor block 32 stochastic, Hadamard 64"
    told = {linear.name.removeprefix(layer): linear for linear in graph.linears}
    assert len(graph.linears) == 8
    q, gate = told["self_attn.q_proj"], told["mlp.gate_proj"]
    assert (q.forward, q.dgrad, q.wgrad) == ("high precision", mxfp4, mxfp4)
    assert (gate.forward, gate.dgrad) == ("mxfp8 e4m3fn rceil block 32", "high precision")
    assert told["mlp.up_proj"].reason == "a linear that `modules` turns off"
    assert told["self_attn.o_proj"].reason == "no norm feeds it, and quantize is 'norm-fed'"
    assert told["lm_head"].reason == "a linear that is cast only if `modules` names it"
    assert f"3 linears: {layer}self_attn.q_proj, " in str(report)
    assert f"dgrad {mxfp4}; wgrad {mxfp4}" in str(report)
    assert mxnorm_pass.Report.from_json(report.to_json()).graphs == report.graphs
    norm = report.sites[0]
    assert norm.near_miss and "its recipe leaves without a cast" in norm.near_miss.found
    with mxnorm_pass.record() as plain:
        train(compiled(model), model)
    assert not plain.graphs[0].linears


@some(["mxfp8"], recipe=RECIPES)
def test_gradients_are_verified(recipe: Any) -> None:
    model = build_llama(layers=1)
    train(compiled(model, recipe=recipe, verify=True), model)


@some(["mxfp8-bf16"], full=0, recipe=RECIPES, dtype=DTYPES)
def test_inductor_error_is_that_of_aot_eager(recipe: Any, dtype: torch.dtype) -> None:
    """Gradients: at most 1.5 times the distance to those of the plain model, which they keep."""
    model = build_llama(dtype, layers=1)
    _, plain = train(model, model)
    _, want = stepped(compiled(model, recipe=recipe), model, seed=0)
    _, got = stepped(compiled(model, recipe=recipe, inner="inductor"), model, seed=0)
    error = relative_error(flat(got), flat(plain))
    assert error <= 1.5 * relative_error(flat(want), flat(plain))
    # The same draws: the two are nearer to each other than either is to the plain model.
    assert relative_error(flat(got), flat(want)) < 0.5 * error


@torch.no_grad()
def test_inference_has_the_recipes_forward() -> None:
    model = build_llama(layers=1)
    got = compiled(model, recipe="mxfp8-e5m2")(IDS, use_cache=False).logits
    want = compiled(model)(IDS, use_cache=False).logits
    assert torch.equal(got, want)


def test_autocast() -> None:
    model = build_llama(layers=1)
    reference = reference_for(model, "mxfp8", every_linear=True)
    with torch.autocast("cpu", torch.bfloat16):
        want, want_gradients = train(reference, reference)
        got, gradients = train(compiled(model, recipe="mxfp8", quantize="all"), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


def test_linears_that_no_recipe_reaches_stay_whole() -> None:
    """A product that is no call of F.linear keeps both directions in high precision."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model, x = Product(), torch.randn(32, 64)
    with pytest.warns(mxnorm_pass.MXNormWarning):
        compiled(model, recipe="mxfp8", quantize="all")(x).square().sum().backward()
    got = gradients_of(model)
    model.zero_grad()
    model(x).square().sum().backward()
    assert_gradients_equal(got, gradients_of(model))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"recipe": "mxfp5"}, "did you mean 'mxfp"),
        ({"recipe": {"forward": {"format": "mxfp4", "hadamard": 32}}}, "no Hadamard transform"),
        ({"recipe": 3}, "None, a dict, or one of"),
        ({"recipe": {"backward": "mxfp8"}}, "'backward'"),
        ({"recipe": {"wgrad": {"format": "mxfp4", "hadamard": 48}}}, "power of two"),
        ({"recipe": "mxfp8", "quantize": "existing"}, "beside a recipe"),
        ({"recipe": "mxfp8", "format": "mxfp4"}, "none beside a recipe"),
        ({"modules": {"*": {"recipe": "mxfp9"}}}, "did you mean"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mxnorm_pass.MXNormConfig(**options)
