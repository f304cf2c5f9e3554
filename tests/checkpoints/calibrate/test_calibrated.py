"""A calibration in the options: what the rewritten graph computes with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from exporting import export, saved_and_loaded
from reference import (
    Recipe,
    build_llama,
    convert_to_mxfp8_training,
    quantize_with_torchao,
    reference_of,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training import IDS, assert_gradients_equal, train
from usage import Block, inputs

import mxnorm_pass
from mxnorm_pass import Calibration, functional, ops

BF16, FP32 = torch.bfloat16, torch.float32
NORMS = [f"model.layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")]
# (K c^p)^-1, of a Gaussian in two blocks of 32.
GAUSSIAN = {p: 0.5 / functional.rms_constant(p, 32) ** p for p in (1.0, 1.5, 2.0)}


def block_weights(seed: int, p: float = 2.0) -> Tensor:
    """Away from the Gaussian's by up to a factor of 2, and from each other."""
    random = torch.Generator().manual_seed(seed)
    return GAUSSIAN[p] * (0.5 + 1.5 * torch.rand(2, generator=random))


def calibration(p: float = 2.0, seed: int = 0, **values: Any) -> Calibration:
    weights = {name: block_weights(10 * seed + i, p) for i, name in enumerate(NORMS)}
    return Calibration(**{"weights": weights, "p": p, **values})


def recipe(made: Calibration, gain: str = "fold", **norm: Any) -> Recipe:
    """What a model of functional computes under that calibration."""
    sites = {
        name: Recipe(norm={"p": made.p, "block_weights": weights, **norm}, gain=gain)
        for name, weights in made.weights.items()
    }
    # An exact norm keeps its gain, so that no bit changes.
    sites |= {name: Recipe(norm={"estimator": "exact"}, gain="activation") for name in made.exact}
    return Recipe(sites=sites)


def compiled(model: nn.Module, made: Any, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    given = {"inner": "aot_eager", "calibration": made, **options}
    return torch.compile(model, backend="mxnorm", options=given)


def infer(model: Callable[..., Any], ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


CASES = [
    (FP32, 1.5, "fold"),
    (BF16, 1, "activation"),
    pytest.param(FP32, 2, "activation", marks=pytest.mark.full),
    pytest.param(BF16, 2, "fold", marks=pytest.mark.full),
]


@pytest.mark.full
@pytest.mark.parametrize("dtype, p, gain", CASES, ids=str)
def test_logits_and_gradients_are_those_of_functional(dtype: Any, p: float, gain: str) -> None:
    model, made = build_llama(dtype), calibration(p, exact=NORMS[1:2])
    reference = reference_of(model, recipe(made, gain))
    want, want_gradients = train(reference, reference)
    got, gradients = train(compiled(model, made, gain=gain), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    other = reference_of(model, recipe(calibration(p, seed=1, exact=NORMS[1:2]), gain))
    assert not torch.equal(want, infer(other))


@pytest.mark.full
def test_orthogonal_gradient() -> None:
    model, made = build_llama(), calibration()
    reference = reference_of(model, recipe(made, gradient="orthogonal"))
    want, want_gradients = train(reference, reference)
    got, gradients = train(compiled(model, made, gradient="orthogonal"), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@pytest.mark.full
def test_quantised_weights() -> None:
    made = calibration()
    model = build_llama(BF16, layers=1)
    reference = reference_of(model, replace(recipe(made, "activation"), every_linear=True))
    got = infer(compiled(quantize_with_torchao(model), made))
    assert torch.equal(got, infer(reference))


@pytest.mark.full
def test_casts_along_both_dimensions() -> None:
    made, model = calibration(), convert_to_mxfp8_training(build_llama(layers=1))
    plain = build_llama(layers=1)
    reference = reference_of(plain, replace(recipe(made), every_linear=True, backward="mx"))
    want, want_gradients = train(reference, reference)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, made), model)
    assert any("norm_cast_both" in op for op in report.graphs[0].ops_after)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


# One norm and its linear


def block_calibration(seed: int = 0, **values: Any) -> Calibration:
    return Calibration(**{"weights": {"norm": block_weights(seed)}, **values})


def block_reference(block: Block, x: Tensor, made: Calibration) -> Tensor:
    """The gain folded into the weight."""
    options: dict[str, Any] = {
        "eps": block.norm.eps, "p": made.p, "block_weights": made.weights["norm"]
    }  # fmt: skip
    y = functional.mxnorm(x, block.norm.weight, **options)
    values, scales, _ = functional.mxnorm_cast(x, **options)
    linear, gain = block.linear, block.norm.weight
    return functional.mx_linear(
        y, linear.weight, linear.bias, gain=gain, quantized=(values, scales)
    )


def assert_close(got: Tensor, want: Tensor) -> None:
    # fp32 sums of 64 terms in another order; no element of these inputs crosses an fp8 step.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gaussian_weights_are_no_calibration() -> None:
    x, gaussian = inputs(4, 64), Calibration({"norm": torch.full((2,), GAUSSIAN[2.0])})
    with torch.no_grad():
        got = compiled(Block(), gaussian)(x)
        torch._dynamo.reset()
        plain = torch.compile(Block(), backend="mxnorm", options={"inner": "aot_eager"})(x)
    assert_close(got, plain)


@pytest.mark.full
def test_inductor_trains() -> None:
    block, reference, made = Block(), Block(), block_calibration()
    x, y = inputs(4, 64).requires_grad_(), inputs(4, 64).requires_grad_()
    got, want = compiled(block, made, inner="inductor")(x), block_reference(reference, y, made)
    assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for ours, theirs in zip((x, *block.parameters()), (y, *reference.parameters()), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("options", [{"inner": "eager"}, {"inner": "inductor", "freezing": True}])
def test_inference(options: dict[str, Any]) -> None:
    block, made, x = Block(), block_calibration(), inputs(4, 64)
    with torch.no_grad():
        assert_close(compiled(block, made, **options)(x), block_reference(block, x, made))


def test_dynamic_shapes() -> None:
    block, made = Block(), block_calibration()
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "calibration": made}
    run = torch.compile(block, backend="mxnorm", dynamic=True, options=options)
    with mxnorm_pass.record() as report, torch.no_grad():
        for rows in (4, 3, 7):
            x = inputs(rows, 64)
            assert torch.equal(run(x), block_reference(block, x, made))
    assert len(report.graphs) == 1


@pytest.mark.full
def test_a_warm_cache_knows_its_calibration(tmp_path: Any) -> None:
    block, x, path = Block(), inputs(4, 64), tmp_path / "calibration"
    for seed, warm in ((0, False), (1, False), (0, True), (1, True)):
        made = block_calibration(seed)
        made.save(path)
        counters.clear()
        with mxnorm_pass.record() as report, torch.no_grad():
            got = compiled(block, path if warm else made, inner="inductor")(x)
        assert_close(got, block_reference(block, x, made))
        assert (counters["inductor"]["fxgraph_cache_hit"] > 0) == warm
        (site,) = report.sites
        assert site.calibration == "block weights" and "block weights" in str(report)


@pytest.mark.full
def test_the_channel_order_is_checked_on_a_warm_cache() -> None:
    """Caches know no values of parameters."""
    order, natural, flipped = torch.arange(63, -1, -1), Block(), Block()
    with torch.no_grad():
        flipped.norm.weight.copy_(natural.norm.weight[order])
    channels = {"norm.weight": flipped.norm.weight}
    made = block_calibration(order=order, channels=channels)
    with torch.no_grad():
        compiled(flipped, made, inner="inductor")(inputs(4, 64))
        with pytest.raises(ValueError, match="permute_channels"):
            compiled(natural, made, inner="inductor")(inputs(4, 64))


def test_dynamo_compares_calibrations_by_content() -> None:
    """Without a reset, as a user changes the options."""
    block, x = Block(), inputs(4, 64)
    torch._dynamo.reset()
    with torch.no_grad(), mxnorm_pass.record() as report:
        for seed in (0, 1, 0):
            made = block_calibration(seed)
            options = {"inner": "aot_eager", "calibration": made}
            got = torch.compile(block, backend="mxnorm", options=options)(x)
            assert torch.equal(got, block_reference(block, x, made))
    assert len(report.graphs) == 2


@pytest.mark.parametrize("decompose", [False, True], ids=["ops", "ATen"])
def test_exported_programs(decompose: bool) -> None:
    block, made, x = Block(), block_calibration(), inputs(4, 64)
    program = mxnorm_pass.apply(export(block, x), {"calibration": made}, decompose=decompose)
    assert (ops.norm_cast in {n.target for n in program.graph.nodes}) != decompose
    with torch.no_grad():
        want = block_reference(block, x, made)
        assert torch.equal(program.module()(x), want)
        assert torch.equal(saved_and_loaded(program).module()(x), want)


class Layers(nn.Module):
    """Two layers of one class, whose graphs are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def test_layers_on_their_own_have_their_own_weights() -> None:
    model, x = Layers(), inputs(4, 64)
    weights = {f"layers.{i}.norm": block_weights(i) for i in range(2)}
    options = {"inner": "aot_eager", "calibration": Calibration(weights)}
    mxnorm_pass.compile_layers(model, "layers.*", options=options)
    with mxnorm_pass.record() as report, torch.no_grad():
        got = model(x)
    assert [(s.norm, s.calibration) for s in report.sites] == [
        (name, "block weights") for name in weights
    ]
    for i in range(2):
        with torch.no_grad():
            assert_close(got[i], block_reference(model.layers[i], x, block_calibration(i)))
    assert not torch.equal(*got)
