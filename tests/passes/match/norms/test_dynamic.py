"""Dynamic shapes, and properties of the matcher over whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_counts import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matching import (
    EPS,
    F32,
    GRADIENT_TOLERANCE,
    TRAIN,
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
    mean_square,
    olmo,
    reference,
    rms_norm,
    run,
    sum_and_sqrt,
    uncompiled,
)
from pairwise import each_value
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


def total(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


class Floats(Model):
    """A norm whose numbers are computed from attributes."""

    def __init__(self, rho: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(None)
        self.rho = rho
        self.eps, self.width, self.root, self.half = EPS, float(WIDTH), WIDTH**0.5, 0.5
        self.register_buffer("eps_buffer", torch.tensor(EPS))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * self.rho(self, x) * self.norm.weight
        return self.first(y), self.second(y)


FLOATS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "width * eps": lambda m, x: torch.rsqrt(total(x) + x.shape[-1] * m.eps) * WIDTH**0.5,
    "float * eps": lambda m, x: torch.rsqrt(total(x) + m.width * m.eps) * m.root,
    "sum / float": lambda m, x: torch.rsqrt(total(x) / m.width + m.eps),
    "power": lambda m, x: (mean_square(x) + m.eps) ** (-m.half),
    "two halves": lambda m, x: torch.rsqrt(mean_square(x) + m.half * m.eps + m.half * m.eps),
    "einsum": lambda m, x: torch.rsqrt(
        torch.einsum("...d,...d->...", x, x)[..., None] / m.width + m.eps
    ),
}


@pytest.mark.full
@each_value(rho=FLOATS, train=TRAIN)
def test_numbers_that_are_computed_from_floats(
    rho: Callable[[Any, Tensor], Tensor], train: bool
) -> None:
    model, x = Floats(rho), inputs().requires_grad_(train)
    got, report = run(model, x, train=train, dynamic=True)
    (site,) = report.sites
    assert (site.status, site.consumers) == ("fused", ("first", "second")), str(site)
    assert_same_bits(got, reference(model, x, model.norm.weight))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x * torch.rsqrt(total(x) + m.width * m.eps) * m.root,
        lambda m, x: m.root * x * torch.rsqrt(total(x) + m.width * m.eps),
        lambda m, x: x / x.norm(dim=-1, keepdim=True) * m.root * m.norm.weight,
    ],
    ids=["after", "before", "of a unit row"],
)
def test_a_factor_that_is_a_float(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = Floats(lambda m, x: x)
    model.forward = lambda x: model.first(forward(model, x))  # type: ignore[method-assign]
    _, report = run(model, inputs(), dynamic=True)
    assert [site.status for site in report.sites] == ["fused"]


NO_FLOATS: dict[str, tuple[Callable[[Any, Tensor], Tensor], SkipReason]] = {
    "clamp": (lambda m, x: torch.rsqrt(mean_square(x).clamp(min=m.eps)), SkipReason.NORM_FORM),
    "factor": (lambda m, x: torch.rsqrt(mean_square(x) + m.eps) * m.half, SkipReason.NORM_FORM),
    "buffer": (
        lambda m, x: torch.rsqrt(mean_square(x) + m.eps_buffer),
        SkipReason.EPS_INPUT,
    ),
    "buffer * float": (
        lambda m, x: torch.rsqrt(mean_square(x) + m.eps_buffer * m.width),
        SkipReason.EPS_INPUT,
    ),
    "clamp at a buffer": (
        lambda m, x: torch.rsqrt(torch.maximum(mean_square(x), m.eps_buffer)),
        SkipReason.EPS_INPUT,
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rho, reason", NO_FLOATS.values(), ids=list(NO_FLOATS))
def test_numbers_that_keep_the_norm(
    rho: Callable[[Any, Tensor], Tensor], reason: SkipReason, dynamic: bool
) -> None:
    model, x = Floats(rho), inputs()
    got, report = run(model, x, dynamic=dynamic)
    assert [site.reason for site in report.sites] == [reason]
    assert_same_bits(got, uncompiled(model, x))


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
    max_examples=examples(6),
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


@pytest.mark.full
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


@each_value(quantize=["norm-fed", "existing"], train=TRAIN)
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
