"""Models that do uncommon things, trained with a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from training import Gradients, assert_gradients_close, assert_gradients_equal, gradients_of

import mxnorm_pass
from mxnorm_pass import functional, ops
from mxnorm_pass.numerics.recipe_text import recipe_text
from mxnorm_pass.numerics.seed import draw_seed

RANDOM = {"base": "mxfp4-rht-sr", "forward": "mxfp8"}


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    defaults = {"inner": "aot_eager", "quantize": "all", "recipe": RANDOM}
    return torch.compile(model, backend="mxnorm", options={**defaults, **options})


@pytest.fixture(autouse=True)
def without_compiled_code() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))


def tokens(*shape: int, requires_grad: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_(requires_grad)


class CheckpointedLayers(nn.Module):
    """Equal layers that are compiled one by one, in checkpoints that Dynamo does not see."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([mlp(), mlp()])
        self._compiled = [compiled(layer) for layer in self.layers]
        self._reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._compiled:
            x = x + checkpoint(layer, x, use_reentrant=self._reentrant)
        return x


def step(model: nn.Module, x: Tensor, seed: int | None = None) -> Gradients:
    if seed is not None:
        torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().sum().backward()
    return gradients_of(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_around_compiled_layers_draw_anew(reentrant: bool) -> None:
    """A reentrant one runs the layer without gradients first, and then from the same state."""
    model, x = CheckpointedLayers(reentrant), tokens(32, 64)
    first, second = step(model, x, seed=0), step(model, x)
    weight = "layers.0.3.weight"
    assert not torch.equal(first[weight], second[weight])
    assert_gradients_equal(step(model, x, seed=0), first)


def test_reentrant_checkpoints_draw_as_others_do() -> None:
    x = tokens(32, 64)
    got, want = (step(CheckpointedLayers(reentrant), x, seed=0) for reentrant in (True, False))
    assert_gradients_equal(got, want)


def test_inference_draws_nothing() -> None:
    model, x = mlp(), tokens(32, 64)
    before = torch.get_rng_state()
    with torch.inference_mode():
        compiled(model)(x)
    assert torch.equal(before, torch.get_rng_state())


def test_explains_a_checkpointed_layer() -> None:
    model = mlp()

    def layer(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    options = {"quantize": "all", "recipe": RANDOM}
    report = mxnorm_pass.explain(layer, tokens(32, 64), options=options)
    assert len(report.fused) == 1


def gradients_per_row(model: nn.Module, x: Tensor) -> Tensor:
    def loss(row: Tensor) -> Tensor:
        return model(row).square().sum()

    return torch.func.vmap(torch.func.grad(loss))(x)


def tangent(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
@pytest.mark.parametrize("derivative", [gradients_per_row, tangent])
def test_graphs_that_take_derivatives_themselves_stay_as_they_are(derivative: Any) -> None:
    model, x = mlp(), tokens(32, 64)
    got = compiled(lambda x: derivative(model, x))(x)
    torch.testing.assert_close(got, derivative(model, x))


def test_what_no_gradient_reads_may_change() -> None:
    """The input of a frozen linear, as in eager mode."""
    linear = nn.Linear(64, 64).requires_grad_(False)

    def changed_behind(x: Tensor) -> Tensor:
        h = x * 2
        y = linear(h)
        h.add_(1)
        return y.sum() + h.sum()

    x = tokens(32, 64)
    (want,) = torch.autograd.grad(changed_behind(x), x)
    (got,) = torch.autograd.grad(compiled(changed_behind, recipe="mxfp8")(x), x)
    assert 0 < (got - want).norm() / want.norm() < 0.1


def test_weights_that_no_gradient_reads_may_change() -> None:
    linear, x = nn.Linear(64, 64), tokens(32, 64, requires_grad=False)

    def decays(x: Tensor) -> Tensor:
        y = linear(x)
        with torch.no_grad():
            linear.weight.mul_(0.5)
        return y.sum()

    before = linear.weight.detach().clone()
    compiled(decays)(x).backward()
    assert torch.equal(linear.weight, before * 0.5)
    assert linear.weight.grad is not None


@pytest.mark.parametrize("high_precision", ["dgrad", "wgrad"])
@pytest.mark.parametrize("rows", [64, 0])
def test_a_matmul_of_the_backward_may_stay_in_high_precision(
    high_precision: str, rows: int
) -> None:
    """What it makes of a norm's output is returned as it is, or without rows is no matmul."""
    model, x = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 32, bias=False)), tokens(rows, 64)
    norm, linear = model
    recipe = {"base": "mxfp8", high_precision: None}
    step(compiled(model, recipe=recipe, estimator="exact"), x)
    got, got_x = gradients_of(model), x.grad
    model.zero_grad()
    x.grad = None
    functional.recipe_linear(norm(x), linear.weight, recipe=recipe).square().sum().backward()
    assert_gradients_equal(got, gradients_of(model))
    assert torch.equal(got_x, x.grad)


def test_linears_without_outputs() -> None:
    linear, x = nn.Linear(64, 0), tokens(4, 64)
    compiled(linear)(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
def test_transposed_inputs_are_cast_as_others(estimator: str) -> None:
    """F.linear multiplies them in batches where nothing says that they need gradients."""
    model, x = mlp(), tokens(4, 33, 64)
    transposed = x.detach().permute(2, 1, 0).contiguous()
    gradients = []
    for function, given in ((model, x), (lambda x: model(x.permute(2, 1, 0)), transposed)):
        model.zero_grad()
        torch._dynamo.reset()
        fast = compiled(function, recipe="mxfp8", estimator=estimator)
        fast(given).square().sum().backward()
        gradients.append(gradients_of(model))
    assert_gradients_close(*gradients, tolerance=1e-6)


def test_one_seed_serves_linears_on_several_devices() -> None:
    matmul = ops.OPS[ops.recipe_matmul].reference
    recipe = recipe_text(functional.recipe("mxfp4-rht-sr").dgrad)
    left, right = (torch.ones(32, 64, device="meta") for _ in range(2))
    assert matmul(left, right, draw_seed(), 0, 0, "dgrad", recipe).device.type == "meta"


def test_a_layers_draws_do_not_depend_on_the_model_around_it() -> None:
    """Equal layers that are compiled on their own share what is compiled, keys included."""
    model, x = mlp(), tokens(32, 64)
    gradients = []
    for prefix in ("model.layers.0", "model.layers.1"):
        torch._dynamo.reset()
        fast = compiled(model, prefix=prefix)
        torch.manual_seed(0)
        model.zero_grad()
        fast(x).square().sum().backward()
        gradients.append(gradients_of(model))
    assert_gradients_equal(*gradients)


class _Matmuls(TorchDispatchMode):
    """Counts the calls of each matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func._schema.name:
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved, recomputed", [(True, 0), (False, 1)])
def test_policies_of_selective_checkpoints_are_asked_about_matmuls(
    saved: bool, recomputed: int
) -> None:
    model, x = mlp(), tokens(2, 32, 64)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_matmul = op is torch.ops.aten.addmm.default
        kept = saved and is_matmul and len(args) == 3
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def layer(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    loss = compiled(layer, recipe="mxfp4")(x).sum()
    with _Matmuls() as matmuls:
        loss.backward()
    assert matmuls.calls["aten::addmm"] == recomputed
