"""Dynamic shapes, and properties of the matcher over whole models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matching import (
    EPS,
    F32,
    GRADIENT_TOLERANCE,
    WIDTH,
    Model,
    Norm,
    assert_fused,
    assert_gradients,
    assert_same_bits,
    assert_untouched,
    eps_outside_sqrt,
    expected_warnings,
    gemma,
    gradients,
    huggingface,
    in_both_modes,
    inputs,
    layer_norm,
    mean_over_tokens,
    olmo,
    reference,
    rms_norm,
    run,
    sum_and_sqrt,
)
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import SkipReason

pytestmark = expected_warnings


@in_both_modes
@pytest.mark.parametrize("dims", [(0,), (0, 1)], ids=str)
def test_dynamic_number_of_tokens(dims: tuple[int, ...], train: bool) -> None:
    model, x = Model(), inputs(4, 6, WIDTH).requires_grad_(train)
    torch._dynamo.mark_dynamic(x, dims)
    got, report = run(model, x, train=train, dynamic=None)
    assert_fused(report)
    assert "f32[4, 6, 128]" not in report.graphs[0].before  # the sizes are symbolic
    want = reference(model, x, model.norm.weight)
    assert_same_bits(got, want)
    if train:
        assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


def test_dynamic_true() -> None:
    """It makes eps a graph input too, unless the pass asks for the number."""
    model, x = Model(), inputs()
    got, report = run(model, x, dynamic=True)
    assert_fused(report)
    assert_same_bits(got, reference(model, x, model.norm.weight))


# Properties


LAYER_KINDS = {
    "hf": (huggingface, True),
    "f": (rms_norm, True),
    "gemma": (gemma, True),
    "sqrt": (sum_and_sqrt, True),
    "outside": (eps_outside_sqrt, False),
    "tokens": (mean_over_tokens, False),
    "double": (lambda x, w, eps: olmo(olmo(x, w, eps), w, eps), None),
    "layer_norm": (layer_norm, None),
}
NORMS_OF = {"double": 2}


class Layer(nn.Module):
    def __init__(self, kind: str, fed: bool) -> None:
        super().__init__()
        self.norm = Norm(LAYER_KINDS[kind][0], torch.rand(64) + 0.5, EPS)
        self.linear = nn.Linear(64, 64) if fed else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + (self.linear(y) if self.linear is not None else y.tanh())


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from(sorted(LAYER_KINDS)), st.booleans()), min_size=1, max_size=5
    ),
    train=st.booleans(),
)
def test_every_norm_gives_one_site(layers: list[tuple[str, bool]], train: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Layer(kind, fed) for kind, fed in layers])
    with torch.set_grad_enabled(train):
        x = inputs(2, 4, 64).requires_grad_(train)
        report = mxnorm_pass.explain(model, x, options={"inner": "aot_eager"})
    names, fused = [], []
    for i, (kind, fed) in enumerate(layers):
        names += [f"{i}.norm"] * NORMS_OF.get(kind, 1)
        if fed and (LAYER_KINDS[kind][1] or kind == "double"):
            fused.append(f"{i}.norm")
    assert [s.norm for s in report.sites] == names
    assert [s.norm for s in report.fused] == fused
    assert len(report.fused) + len(report.skipped) == len(names)
    assert all((s.reason is None) == (s.status == "fused") for s in report.sites)


@in_both_modes
def test_explain_with_everything_off(train: bool) -> None:
    model = nn.Sequential(*[Layer(kind, True) for kind in LAYER_KINDS])
    x = inputs(2, 4, 64).requires_grad_(train)
    with torch.set_grad_enabled(train):
        options = {"inner": "aot_eager", "modules": {"*": False}}
        report = mxnorm_pass.explain(model, x, options=options)
    (graph,) = report.graphs
    assert graph.name == ("training_0" if train else "inference_0")
    assert len(graph.sites) == 9 and report.fused == []
    assert {s.reason for s in graph.sites} == {SkipReason.DISABLED}
    assert_untouched(report)


@in_both_modes
@pytest.mark.parametrize("quantize", ["norm-fed", "existing"])
def test_graph_without_a_norm(quantize: str, train: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    x = inputs(2, 4, 64).requires_grad_(train)
    got, report = run(model, x, train=train, quantize=quantize)
    assert report.sites == [] and len(report.graphs) == 1
    assert_untouched(report)
    want = model(x)
    assert_same_bits([got], [want])
    if train:
        leaves = [x, *model.parameters()]
        assert_same_bits(gradients([got], leaves), gradients([want], leaves))
