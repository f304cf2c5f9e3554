"""Properties of the pass over random small models: sites, results, gradients, untouched graphs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hand_casts import E4M3_FLOOR, dequantize, hand_cast_reference
from hypothesis import given
from matching import (
    BF16,
    F32,
    GRADIENT_TOLERANCE,
    WIDTH,
    Model,
    assert_close,
    assert_fused,
    assert_gradients,
    assert_same_bits,
    assert_untouched,
    expected_warnings,
    gradients,
    inputs,
    mean_square,
    olmo,
    reference,
    run,
)
from random_graphs import RandomModel, Reference, arguments
from random_models import all_gradients, assert_same_results, check_sites, compiled, eager, examples
from random_specs import ModelSpec, NormSpec, ReaderSpec, StageSpec, model_specs
from torch import Tensor, fx

from mxnorm_pass import Report, SkipReason
from mxnorm_pass.compilation import job
from mxnorm_pass.compilation.inductor_passes import MXNormPass
from mxnorm_pass.passes.joint import run_pass
from mxnorm_pass.report.site import PassResult

pytestmark = expected_warnings


@examples(5)
@given(model_specs())
def test_every_norm_gives_one_site(spec: ModelSpec) -> None:
    model, args = RandomModel(spec), arguments(spec)
    check_sites(spec, model, compiled(spec, model, args)[1])


# estimator="exact"


def check_exact(spec: ModelSpec) -> None:
    """The uncompiled model with the same casts, bit for bit."""
    model, args = RandomModel(spec), arguments(spec)
    got, report = compiled(spec, model, args, estimator="exact")
    reference = Reference.of(model, spec, report)
    with torch.set_grad_enabled(spec.train):
        assert_same_results(got, reference.outputs(*args))
    if spec.options["quantize"] == "existing" or spec.has_only_own_casts:
        assert_same_results(got, eager(spec, model, args))
    if spec.train and spec.options["quantize"] == "existing":
        gradients = all_gradients(model, args, got)
        torch._dynamo.reset()
        with torch.autocast("cpu", BF16, enabled=spec.autocast):
            plain = torch.compile(model, backend="aot_eager", dynamic=False)(*args)
        want = all_gradients(model, args, plain)
        assert gradients.keys() == want.keys()
        assert_same_results(tuple(gradients.values()), tuple(want.values()))


@examples(5)
@given(model_specs())
def test_exact_changes_no_bit(spec: ModelSpec) -> None:
    check_exact(spec)


@examples(4)
@given(model_specs(own_casts=True, quantize=("existing",)))
def test_exact_changes_no_bit_of_a_converted_model(spec: ModelSpec) -> None:
    check_exact(spec)


# Everything off


def check_off(spec: ModelSpec) -> None:
    model, args = RandomModel(spec), arguments(spec)
    got, report = compiled(spec, model, args, modules={"*": False})
    assert_untouched(report)
    assert {s.reason for s in report.sites} <= {SkipReason.DISABLED}
    assert_same_results(got, eager(spec, model, args))


@examples(4)
@given(model_specs())
def test_everything_off_changes_nothing(spec: ModelSpec) -> None:
    check_off(spec)


# estimator="mxnorm"


def check_results(
    spec: ModelSpec,
    model: RandomModel,
    args: tuple[Tensor, ...],
    got: tuple[Tensor, ...],
    report: Report,
) -> None:
    """Fused readers get what ``functional`` computes, all others the exact norm."""
    reference = Reference.of(model, spec, report)
    with torch.set_grad_enabled(spec.train):
        want = reference.outputs(*args)
    assert_same_results(got, want)
    if not spec.train:
        return
    gradients, references = (all_gradients(model, args, y) for y in (got, want))
    assert gradients.keys() == references.keys()
    tensors = [*args, *model.parameters(), *got]
    tolerance = GRADIENT_TOLERANCE[BF16 if any(t.dtype == BF16 for t in tensors) else F32]
    assert_close(list(gradients.values()), list(references.values()), list(gradients), tolerance)


def check_model(spec: ModelSpec) -> None:
    model, args = RandomModel(spec), arguments(spec)
    got, report = compiled(spec, model, args, verify=True)
    check_sites(spec, model, report)
    check_results(spec, model, args, got, report)


@examples(12)
@given(model_specs())
def test_results_are_those_of_functional(spec: ModelSpec) -> None:
    check_model(spec)


# The pass, once more


class TwicePass(MXNormPass):
    """Runs the pass, then once more on the graph that it wrote."""

    again: list[PassResult]

    def __call__(self, graph: fx.Graph) -> None:
        outputs = [n.meta.get("val") for n in graph.output_node().all_input_nodes]
        super().__call__(graph)
        after = [n.meta.get("val") for n in graph.output_node().all_input_nodes]
        for a, b in zip(outputs, after, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        graph.lint()
        options = {"facts": self._facts(self._scopes[0]), "decompositions": self._decompositions}
        type(self).again.append(run_pass(graph, self.config, **options))


def check_twice(spec: ModelSpec, model: RandomModel, args: tuple[Tensor, ...]) -> Any:
    TwicePass.again = []
    with mock.patch.object(job, "MXNormPass", TwicePass):
        got, report = compiled(spec, model, args)
    (again,) = TwicePass.again
    assert again.graph.before == again.graph.after
    assert all(site.status == "skipped" for site in again.sites)
    return got, report


@examples(4)
@given(model_specs())
def test_a_second_run_changes_nothing(spec: ModelSpec) -> None:
    model, args = RandomModel(spec), arguments(spec)
    got, _ = check_twice(spec, model, args)
    for a, b in zip(got, eager(spec, model, args), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


# What the search found


def scaled_gain(x: Tensor, w: Tensor, eps: float) -> Tensor:
    gain = w * 0.5
    return x * torch.rsqrt(mean_square(x) + eps) * gain


def test_gain_computed_in_front_of_a_norm_without_gradient() -> None:
    """The gain's op draws the number that the norm's unrecorded ops bear too."""
    model, x = Model(scaled_gain), inputs()
    got, report = run(model, x, train=True)
    assert_fused(report)
    want = reference(model, x, model.norm.weight * 0.5)
    names, leaves = zip(*model.named_parameters(), strict=True)
    close = gradients(got, leaves), gradients(want, leaves)
    assert_close(*close, names, GRADIENT_TOLERANCE[F32])


class UnrecordedBetween(Model):
    """2-D activations: the matmul is the first linear's last op."""

    def __init__(self, under_no_grad: bool) -> None:
        super().__init__(olmo)
        self.under_no_grad = under_no_grad

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        second = self.second(y)
        if not self.under_no_grad:
            return self.first(y), second, torch.sigmoid(y.detach())
        with torch.no_grad():
            read = torch.sigmoid(y)
        return self.first(y), second, read


@pytest.mark.parametrize("under_no_grad", [False, True])
def test_reader_without_gradient_after_a_linear(under_no_grad: bool) -> None:
    model, x = UnrecordedBetween(under_no_grad), inputs(16, WIDTH).requires_grad_()
    got, _ = run(model, x, train=True)
    want = reference(model, x, model.norm.weight)
    assert_same_bits(got[:2], want)
    assert_gradients(model, x, got[:2], want, GRADIENT_TOLERANCE[F32])


class WeightCastFirst(Model):
    """The weight is cast before the gain is computed."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        weight = dequantize(*E4M3_FLOOR(self.second.weight))
        gain = self.norm.weight * 0.5
        y = olmo(x, gain, self.norm.eps)
        return (F.linear(dequantize(*E4M3_FLOOR(y)), weight),)


def test_gain_computed_after_the_weights_cast() -> None:
    model, x = WeightCastFirst(), inputs(scale=1.0)
    got, report = run(model, x, quantize="existing")
    assert [(s.status, s.gain) for s in report.sites] == [("fused", "fold")]
    with torch.no_grad():
        model.norm.weight.mul_(0.5)
    assert_same_bits(got, hand_cast_reference(model, x, "floor")[1:])


@pytest.mark.full
@pytest.mark.parametrize("view", ["none", "unsqueeze", "row by row"])
def test_two_symbolic_sizes_of_a_norm_over_heads(view: str) -> None:
    """The cast's shape has both, and another rank than what the norm normalises."""
    reader = ReaderSpec("linear", view, F32, "by hand", "floor by bits")
    stage = StageSpec(NormSpec("huggingface", heads=True), (reader, ReaderSpec("elementwise")))
    spec = ModelSpec((3, 8, 64), F32, (stage,), dynamic=True, options={"quantize": "existing"})
    check_model(spec)


def test_two_fused_norms_in_a_row() -> None:
    """The second one's gradient is a sum that the first one's cotangent holds as one term."""
    linear = ReaderSpec(rows=64)
    first = StageSpec(NormSpec("huggingface"), (linear,))
    second = StageSpec(NormSpec("olmo"), (linear,), source="norm")
    options = {"quantize": "norm-fed"}
    check_model(ModelSpec((32, 64), F32, (first, second), train=True, options=options))
