"""Norms that are recognised by evaluation: what fuses, what is named, and what is no norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from matching import (
    TRAIN,
    WIDTH,
    Model,
    NormFunction,
    assert_fused,
    assert_same_bits,
    assert_skipped,
    assert_untouched,
    expected_warnings,
    in_both_modes,
    inputs,
    only_site,
    reference,
    run,
    uncompiled,
)
from norm_spellings import (
    FUNCTIONS_OF_THE_NORM,
    LAYER_NORMS,
    NO_NORMS,
    OTHER_FORMS,
    UNUSUAL,
    WITHOUT_EPS,
    einsum,
    mean_square,
)
from pairwise import each_value
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report, SkipReason

pytestmark = expected_warnings


def functions(found: dict[str, NormFunction]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("function", found.values(), ids=list(found))


def explained(model: nn.Module, *args: Tensor, inner: str = "aot_eager") -> Report:
    torch._dynamo.reset()
    return mxnorm_pass.explain(model, *args, options={"inner": inner})


@pytest.mark.full
@functions(UNUSUAL | WITHOUT_EPS)
def test_fuses_as_inductor_decomposes_it(function: NormFunction) -> None:
    site = only_site(explained(Model(function), inputs(), inner="inductor"))
    assert (site.norm, site.status) == ("norm", "fused")


@pytest.mark.full
@functions(UNUSUAL | WITHOUT_EPS)
def test_exact_refuses_the_rounding_of_other_ops(function: NormFunction) -> None:
    model, x = Model(function), inputs()
    got, report = run(model, x, estimator="exact", quantize="existing")
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


@pytest.mark.parametrize("eps", [1e-6, 1e-3, torch.finfo(torch.float32).eps])
def test_eps_is_the_number_that_the_model_spells(eps: float) -> None:
    model, x = Model(einsum, eps=eps), inputs()
    got, report = run(model, x)
    assert_fused(report)
    assert f", {eps:.9g}, 'mxnorm'" in report.graphs[0].after
    assert_same_bits(got, reference(model, x, model.norm.weight, eps=eps))


@each_value(function=OTHER_FORMS | FUNCTIONS_OF_THE_NORM, train=TRAIN)
def test_other_functions_of_the_norm_are_named(function: NormFunction, train: bool) -> None:
    model, x = Model(function), inputs().requires_grad_(train)
    got, report = run(model, x, train=train)
    site = assert_skipped(report, SkipReason.NORM_FORM)
    assert site.norm == "norm" and site.near_miss is not None
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


class Scores(Model):
    """No linear reads the norm, but a product with another norm."""

    def forward(self, x: Tensor) -> Tensor:
        other = self.norm.function(x.cos(), self.norm.weight, self.norm.eps)
        return self.norm(x) @ other.mT


@functions(OTHER_FORMS)
def test_an_rms_norm_is_named_whoever_reads_it(function: NormFunction) -> None:
    report = explained(Scores(function), inputs())
    assert [site.reason for site in report.sites] == [SkipReason.NORM_FORM] * 2


@functions(FUNCTIONS_OF_THE_NORM)
def test_what_no_linear_reads_is_no_norm(function: NormFunction) -> None:
    assert explained(Scores(function), inputs()).sites == []


@each_value(function=LAYER_NORMS, inner=["aot_eager", "inductor"])
def test_layer_norms(function: NormFunction, inner: str) -> None:
    report = explained(Model(function), inputs(), inner=inner)
    assert_skipped(report, SkipReason.LAYER_NORM)
    assert_untouched(report)


@each_value(function=NO_NORMS, inner=["aot_eager", "inductor"], train=TRAIN)
def test_no_norms(function: NormFunction, inner: str, train: bool) -> None:
    with torch.set_grad_enabled(train):
        report = explained(Model(function), inputs().requires_grad_(train), inner=inner)
    assert report.sites == [] and len(report.graphs) == 1
    assert_untouched(report)


def scale_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.normalize(x, dim=-1) * w


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (WIDTH,)], ids=str)
def test_a_linear_reads_it_through_any_gain(shape: tuple[int, ...]) -> None:
    report = explained(Model(scale_norm, gain_shape=shape), inputs())
    assert_skipped(report, SkipReason.NORM_FORM)


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x, y, dim=-1)


def cosine_by_hand(x: Tensor, y: Tensor) -> Tensor:
    x, y = (t / t.norm(dim=-1, keepdim=True) for t in (x, y))
    return x @ y.mT


def contrastive_loss(x: Tensor, y: Tensor) -> Tensor:
    logits = F.normalize(x, dim=-1).flatten(0, 1) @ F.normalize(y, dim=-1).flatten(0, 1).mT
    return F.cross_entropy(logits / 0.07, torch.arange(16))


def softmax(x: Tensor, y: Tensor) -> Tensor:
    return x.softmax(-1) * y.log_softmax(-1)


def attention(x: Tensor, y: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, y, y) @ x.mT


def gumbel(x: Tensor, y: Tensor) -> Tensor:
    return F.gumbel_softmax(x, dim=-1, hard=True)


def batch_norm(x: Tensor, y: Tensor) -> Tensor:
    return F.batch_norm(x.mT, None, None, training=True)


def clipped_gradient(x: Tensor, y: Tensor) -> Tensor:
    return x * (1.0 / (x.norm() + 1e-6)).clamp(max=1.0)


def float8_rows(x: Tensor, y: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "function",
    [
        cosine_similarity,
        cosine_by_hand,
        contrastive_loss,
        softmax,
        attention,
        gumbel,
        batch_norm,
        clipped_gradient,
        float8_rows,
    ],
    ids=lambda function: function.__name__,
)
def test_what_models_compute_beside_norms(
    function: Callable[[Tensor, Tensor], Tensor], inner: str
) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.LazyLinear(32)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result = function(x, y)
            return self.linear(result) if result.ndim > 2 else result

    model, x, y = Reads(), inputs(), inputs(seed=3)
    model(x, y)
    assert explained(model, x, y, inner=inner).sites == []


class WeightNorm(Model):
    """Rows of a weight are divided by their norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.second.weight, dim=-1))


def test_a_normalised_weight_is_no_norm() -> None:
    assert explained(WeightNorm(), inputs()).sites == []


# One norm, one site


class SharedNumber(Model):
    """The norm's product is computed twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rho = torch.rsqrt(x.abs().square().mean(-1, keepdim=True) + self.norm.eps)
        return self.first(x * rho * self.norm.weight), (x * rho).sigmoid()


class TwoNorms(Model):
    """Each with numbers of its own, of one x."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, eps = self.norm.weight, self.norm.eps
        return self.first(einsum(x, weight, eps)), self.second(einsum(x.clone(), weight, 2 * eps))


def test_a_product_that_is_computed_again_is_the_same_norm() -> None:
    assert len(explained(SharedNumber(), inputs()).sites) == 1


def test_two_norms_of_one_tensor_are_two() -> None:
    sites = explained(TwoNorms(), inputs()).sites
    assert [(site.status, site.consumers) for site in sites] == [
        ("fused", ("first",)),
        ("fused", ("second",)),
    ]


# Shapes


@pytest.mark.parametrize("shape", [(16, WIDTH), (1, WIDTH), (1, 1, WIDTH), (WIDTH, WIDTH)], ids=str)
@functions({"einsum": einsum, "clamp": OTHER_FORMS["clamped rms"]})
def test_shapes(function: NormFunction, shape: tuple[int, ...]) -> None:
    status = "fused" if function is einsum else "skipped"
    assert only_site(explained(Model(function), inputs(*shape))).status == status


def clamped_without_keepdim(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Scales columns, for a square x."""
    return x / x.norm(dim=-1).clamp(min=eps) * w


@pytest.mark.parametrize("shape", [(WIDTH, WIDTH), (1, WIDTH, WIDTH)], ids=str)
def test_numbers_that_meet_columns(shape: tuple[int, ...]) -> None:
    assert explained(Model(clamped_without_keepdim), inputs(*shape)).sites == []


@functions({"einsum": einsum, "clamp": OTHER_FORMS["clamped rms"]})
def test_dynamic_number_of_rows(function: NormFunction) -> None:
    model, x = Model(function), inputs(4, 6, WIDTH)
    torch._dynamo.mark_dynamic(x, (0, 1))
    got, report = run(model, x, dynamic=None)
    assert "f32[4, 6, 128]" not in report.graphs[0].before
    if function is einsum:
        assert_fused(report)
        assert_same_bits(got, reference(model, x, model.norm.weight))
    else:
        assert_skipped(report, SkipReason.NORM_FORM)


def test_dynamic_width() -> None:
    x = inputs(4, WIDTH)
    torch._dynamo.mark_dynamic(x, 1)
    site = only_site(explained(ClampedAlone(), x))
    assert site.reason is SkipReason.WIDTH


class ClampedAlone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / mean_square(x).sqrt().clamp(min=1e-6)


# After the linear


class AfterLinear(nn.Module):
    """``read`` makes the result of what the linear makes of x, x and the linear's own result."""

    def __init__(
        self,
        read: Callable[[Tensor, Tensor], Tensor],
        bias: bool = False,
        gain: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 24, bias=bias)
        self.read = read
        self.weight = nn.Parameter(torch.rand(WIDTH)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x if self.weight is None else x * self.weight)
        return self.read(y, x)


def rho(x: Tensor) -> Tensor:
    return torch.rsqrt(mean_square(x) + 1e-6)


AFTER_LINEAR = {
    "product": lambda y, x: y * rho(x),
    "quotient": lambda y, x: y / mean_square(x).add(1e-6).sqrt(),
    "clamp": lambda y, x: y / x.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    "scaled": lambda y, x: 0.5 * y * rho(x) + 1.0,
    "parts": lambda y, x: (y[..., :8] * rho(x)).tanh(),
    "heads": lambda y, x: y.unflatten(-1, (4, 6)).flatten(-2) * rho(x),
    "upcast": lambda y, x: y.double() * rho(x.double()),
}


@pytest.mark.full
@in_both_modes
@pytest.mark.parametrize("bias, gain", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("read", AFTER_LINEAR.values(), ids=list(AFTER_LINEAR))
def test_norm_after_the_linear(
    read: Callable[[Tensor, Tensor], Tensor], bias: bool, gain: bool, train: bool
) -> None:
    model, x = AfterLinear(read, bias, gain), inputs()
    with torch.set_grad_enabled(train):
        report = explained(model, x)
    site = assert_skipped(report, SkipReason.AFTER_LINEAR)
    assert "is divided by the norm of what it reads" in site.detail
    assert_untouched(report)


NOT_AFTER_LINEAR = {
    "norm of another": lambda y, x: y * rho(x.sin()),
    "absmax": lambda y, x: y / x.abs().amax(-1, keepdim=True),
    "growing": lambda y, x: y / rho(x),
    "softmax": lambda y, x: y * x.softmax(-1)[..., :1],
}


@pytest.mark.parametrize("read", NOT_AFTER_LINEAR.values(), ids=list(NOT_AFTER_LINEAR))
def test_other_numbers_after_the_linear(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert explained(AfterLinear(read), inputs()).sites == []


def test_a_norm_of_the_linears_result_is_a_norm_of_it() -> None:
    site = only_site(explained(AfterLinear(lambda y, x: y * rho(y)), inputs()))
    assert site.reason is SkipReason.NO_MX_CAST or site.reason is SkipReason.WIDTH


class BothSides(Model):
    """One statistic serves a norm before a linear and one after another."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        number = rho(x)
        return self.first(x * number * self.norm.weight), self.second(x) * number


def test_a_norm_and_one_after_a_linear_are_two_sites() -> None:
    report = explained(BothSides(), inputs())
    assert [(s.status, s.reason) for s in report.sites] == [
        ("fused", None),
        ("skipped", SkipReason.AFTER_LINEAR),
    ]


def test_hyper_connections() -> None:
    """The mixing weights of DeepSeek's mHC: streams in one row, norm after the linear."""

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4 * WIDTH, 24, bias=False)
            self.scale = nn.Parameter(torch.rand(3))

        def forward(self, streams: Tensor) -> Tensor:
            x = streams.flatten(-2).float()
            mixes = self.linear(x) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            return torch.sigmoid(mixes[..., :4] * self.scale[0]).unsqueeze(-2) @ streams

    assert_skipped(explained(Mix(), inputs(2, 8, 4, WIDTH)), SkipReason.AFTER_LINEAR)


def test_constants_are_spelled_by_tensors() -> None:
    """A number in a tensor that the model makes is as good as a float."""
    eps = 1e-5
    model = Model(lambda x, w, _: x * torch.rsqrt(mean_square(x) + torch.tensor(eps)) * w)
    got, report = run(model, inputs())
    assert_fused(report)
    spelled = float(torch.tensor(eps))
    assert math.isclose(spelled, eps, rel_tol=1e-7)
    assert_same_bits(got, reference(model, inputs(), model.norm.weight, eps=spelled))
