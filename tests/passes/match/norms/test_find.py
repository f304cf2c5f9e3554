"""Spellings of a norm that fuse, and one-edit near misses that do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from matching import (
    BF16,
    DTYPES,
    F32,
    GRADIENT_TOLERANCE,
    SPELLINGS,
    TRAIN,
    WIDTH,
    Model,
    NormFunction,
    Spelling,
    assert_close,
    assert_fused,
    assert_gradients,
    assert_same_bits,
    assert_skipped,
    assert_untouched,
    eps_outside_sqrt,
    expected_warnings,
    gradients,
    huggingface,
    in_both_modes,
    in_its_own_dtype,
    input_computed_twice,
    inputs,
    layer_norm,
    layer_norm_by_hand,
    layer_norm_of_var_mean,
    layer_norm_of_variance,
    mean_over_tokens,
    mean_square,
    narrowed_first,
    only_site,
    reference,
    rms_norm,
    run,
    spellings,
    uncompiled,
    variance_norm,
)
from pairwise import each_value
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import SkipReason

pytestmark = expected_warnings


@each_value(spelling=SPELLINGS, dtypes=["fp32", "bf16"])
def test_spelling_fuses(spelling: Spelling, dtypes: str) -> None:
    check_spelling(spelling, *DTYPES[dtypes])


@each_value(
    spelling={n: SPELLINGS[n] for n in ("huggingface", "nn.RMSNorm", "gemma", "t5")},
    dtypes=["bf16, fp32 gain", "fp32, bf16 gain"],
)
def test_gain_of_another_dtype(spelling: Spelling, dtypes: str) -> None:
    check_spelling(spelling, *DTYPES[dtypes])


def check_spelling(spelling: Spelling, dtype: torch.dtype, gain_dtype: torch.dtype) -> None:
    model = spelling.model(dtype=dtype, gain_dtype=gain_dtype)
    x = inputs(dtype=dtype)
    gain = "fold" if spelling.has_gain else None
    want = spelling.reference(model, x)

    got, report = run(model, x)
    assert_fused(report, gain=gain)
    assert_same_bits(got, want)

    x.requires_grad_()
    got, report = run(model, x, train=True)
    assert_fused(report, gain=gain)
    assert report.graphs[0].name == "training_0"
    assert_same_bits(got, want)
    tolerance = GRADIENT_TOLERANCE[BF16 if BF16 in (dtype, gain_dtype) else F32]
    assert_gradients(model, x, got, spelling.reference(model, x), tolerance)


@each_value(
    spelling={n: SPELLINGS[n] for n in ("huggingface", "F.rms_norm", "sum and sqrt")},
    gradient=["orthogonal", "paper"],
)
def test_other_gradients(spelling: Spelling, gradient: str) -> None:
    model, x = spelling.model(), inputs().requires_grad_()
    got, report = run(model, x, train=True, gradient=gradient)
    assert_fused(report)
    want = spelling.reference(model, x, gradient=gradient)
    # It is not the default's gradient.
    (own,) = gradients(want, [x], retain=True)
    (default,) = gradients(spelling.reference(model, x), [x])
    assert (own - default).norm() > 10 * GRADIENT_TOLERANCE[F32] * default.norm()
    assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


@each_value(
    spelling={n: SPELLINGS[n] for n in ("huggingface", "nn.RMSNorm", "eps before the division")},
    eps=[1e-6, 1e-3, 0.1],
)
def test_eps_is_read_off_the_node(spelling: Spelling, eps: float) -> None:
    model, x = spelling.model(eps=eps), inputs()
    got, report = run(model, x)
    assert_fused(report)
    assert_same_bits(got, spelling.reference(model, x, eps=eps))
    others = [e for e in (1e-6, 1e-3, 0.1) if e != eps]
    assert not any(torch.equal(got[0], spelling.reference(model, x, eps=e)[0]) for e in others)


def test_default_eps_of_rms_norm() -> None:
    model, x = Model(lambda x, w, eps: F.rms_norm(x, (WIDTH,), w)), inputs(scale=1e-3)
    got, report = run(model, x)
    assert_fused(report)
    assert_same_bits(got, reference(model, x, model.norm.weight, eps=torch.finfo(F32).eps))


def test_zero_row_stays_finite() -> None:
    model, x = Model(), inputs(4, WIDTH)
    x[1] = 0
    got, report = run(model, x)
    assert_fused(report)
    assert_same_bits(got, reference(model, x, model.norm.weight))
    assert torch.equal(got[1][1], torch.zeros(32))


def test_narrowing_in_front_of_the_norm() -> None:
    model, x = Model(narrowed_first), inputs(scale=1.0)
    got, report = run(model, x)
    assert_fused(report)
    assert_same_bits(got, reference(model, x.to(BF16), model.norm.weight))


# Surroundings of the norm


@in_both_modes
@pytest.mark.parametrize(
    "shape", [(16, WIDTH), (1, WIDTH), (1, 1, WIDTH), (2, 2, 4, WIDTH)], ids=str
)
def test_rank_of_the_input(shape: tuple[int, ...], train: bool) -> None:
    model, x = Model(), inputs(*shape).requires_grad_(train)
    got, report = run(model, x, train=train)
    assert_fused(report)
    want = reference(model, x, model.norm.weight)
    assert_same_bits(got, want)
    if train:
        assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


@in_both_modes
@spellings("huggingface", "own dtype")
def test_residual_add_in_front(spelling: Spelling, train: bool) -> None:
    model = spelling.model()

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
            total = x + branch
            return (*self.inner(total), total)

    x, branch = inputs().requires_grad_(train), inputs(seed=3)
    got, report = run(Residual(), x, branch, train=train)
    site = only_site(report)
    assert (site.status, site.consumers) == ("fused", ("inner.first", "inner.second"))
    want = (*spelling.reference(model, x + branch), x + branch)
    assert_same_bits(got, want)
    if train:
        assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


@each_value(
    function=[huggingface, rms_norm],
    frozen=["x", "norm.weight", "first.weight", "x and norm.weight"],
)
def test_frozen_tensors(function: NormFunction, frozen: str) -> None:
    """Autograd then leaves out parts of the backward that the matcher looks for."""
    model, x = Model(function), inputs()
    x.requires_grad_("x" not in frozen.split())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen.split())
    got, report = run(model, x, train=True)
    assert_fused(report)
    want = reference(model, x, model.norm.weight)
    assert_same_bits(got, want)
    leaves = {"x": x, **dict(model.named_parameters())}
    names, tensors = zip(*[(n, t) for n, t in leaves.items() if t.requires_grad], strict=True)
    close = gradients(got, tensors), gradients(want, tensors)
    assert_close(*close, names, GRADIENT_TOLERANCE[F32])


# Near misses: the statistic


def mean_over_two_dims(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + eps) * w


def eps_outside_rsqrt(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * (torch.rsqrt(mean_square(x)) + eps) * w


def eps_outside_vector_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (x.norm(2, -1, keepdim=True) * x.shape[-1] ** -0.5 + eps) * w


def eps_below_zero(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x) + -eps) * w


def sum_alone(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps) * w


def sum_over_width_plus_one(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / (x.shape[-1] + 1) + eps) * w


@pytest.mark.parametrize(
    "function, reason",
    [
        (mean_over_tokens, SkipReason.NORM_DIMENSION),
        (mean_over_two_dims, SkipReason.NORM_DIMENSION),
        (eps_outside_sqrt, SkipReason.NORM_FORM),
        (eps_outside_rsqrt, SkipReason.NORM_FORM),
        (eps_outside_vector_norm, SkipReason.NORM_FORM),
        (eps_below_zero, SkipReason.NORM_FORM),
        # x / |x| is a norm of its row, so it is reported, as one with another scale.
        (sum_alone, SkipReason.NORM_FORM),
        (sum_over_width_plus_one, SkipReason.NORM_FORM),
    ],
    ids=lambda p: getattr(p, "__name__", getattr(p, "name", None)),
)
def test_other_statistics(function: NormFunction, reason: SkipReason) -> None:
    model, x = Model(function), inputs()
    got, report = run(model, x)
    site = assert_skipped(report, reason)
    assert site.norm == "norm" and site.detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def fourth_power(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + eps) * w


def scales_another_tensor(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x.sin() * torch.rsqrt(mean_square(x) + eps) * w


@pytest.mark.parametrize(
    "function",
    [variance_norm, fourth_power, scales_another_tensor],
    ids=lambda f: f.__name__,
)
def test_no_rms_norm_gives_no_site(function: NormFunction) -> None:
    model, x = Model(function), inputs()
    got, report = run(model, x)
    assert report.sites == [] and len(report.graphs) == 1
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


LAYER_NORMS = [
    layer_norm,
    layer_norm_by_hand,
    layer_norm_of_variance,
    layer_norm_of_var_mean,
]


@each_value(function=LAYER_NORMS, inner=["aot_eager", "inductor"], train=TRAIN)
def test_layer_norm(function: NormFunction, inner: str, train: bool) -> None:
    """Fused as one op, or decomposed by Inductor or by hand."""
    with torch.set_grad_enabled(train):
        report = mxnorm_pass.explain(Model(function), inputs(), options={"inner": inner})
    assert_skipped(report, SkipReason.LAYER_NORM)
    assert_untouched(report)


@in_both_modes
def test_input_computed_twice(train: bool) -> None:
    """Both computations are one x; its gradient is the sum over both."""
    model, x = Model(input_computed_twice), inputs()
    x.requires_grad_(train)
    got, report = run(model, x, train=train)
    assert_fused(report)
    want = reference(model, x + x.tanh(), model.norm.weight)
    assert_same_bits(got, want)
    if train:
        assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


def no_keepdim(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Scales columns, for a square x."""
    return x * torch.rsqrt(x.pow(2).mean(-1) + eps) * w


@pytest.mark.parametrize("shape", [(WIDTH, WIDTH), (1, WIDTH, WIDTH)], ids=str)
def test_statistic_that_scales_columns(shape: tuple[int, ...]) -> None:
    model, x = Model(no_keepdim), inputs(*shape)
    got, report = run(model, x)
    assert report.fused == []
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


# Near misses: width, dtypes and gain


@pytest.mark.parametrize("spelling", [huggingface, rms_norm], ids=lambda f: f.__name__)
def test_width_not_a_multiple_of_the_block(spelling: NormFunction) -> None:
    model, x = Model(spelling, width=48), inputs(2, 8, 48)
    got, report = run(model, x)
    assert "48" in assert_skipped(report, SkipReason.WIDTH).detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def test_float64() -> None:
    model, x = Model(in_its_own_dtype, dtype=torch.float64), inputs(dtype=torch.float64)
    got, report = run(model, x)
    assert "float64" in assert_skipped(report, SkipReason.DTYPE).detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def test_float16_linears_get_no_casts() -> None:
    half = torch.float16
    model, x = Model(dtype=half), inputs(dtype=half, scale=1.0)
    got, report = run(model, x)
    assert_skipped(report, SkipReason.NO_MX_CAST)
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


@pytest.mark.parametrize(
    "shape, reason",
    [
        ((), SkipReason.GAIN_SHAPE),
        ((1,), SkipReason.GAIN_SHAPE),
        ((8, 1), SkipReason.GAIN_SHAPE),
        ((8, WIDTH), SkipReason.GAIN_SHAPE),
        ((2, 8, WIDTH), SkipReason.GAIN_SHAPE),
    ],
    ids=str,
)
def test_gain_not_per_channel(shape: tuple[int, ...], reason: SkipReason) -> None:
    model, x = Model(in_its_own_dtype, gain_shape=shape), inputs()
    got, report = run(model, x)
    assert str(shape) in assert_skipped(report, reason).detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


@pytest.mark.parametrize("shape", [(1, WIDTH), (1, 1, WIDTH)], ids=str)
def test_gain_with_leading_ones(shape: tuple[int, ...]) -> None:
    model, x = Model(in_its_own_dtype, gain_shape=shape), inputs()
    got, report = run(model, x)
    assert_fused(report)
    assert_same_bits(got, reference(model, x, model.norm.weight.reshape(-1)))


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (1, 1, WIDTH)], ids=str)
def test_one_row_with_a_gain_of_its_shape(shape: tuple[int, ...]) -> None:
    """The gain's gradient, of x's shape, is no part of x's gradient."""
    model, x = Model(gain_shape=shape), inputs(*shape).requires_grad_()
    got, report = run(model, x, train=True)
    assert_fused(report)
    want = reference(model, x, model.norm.weight.reshape(-1))
    assert_same_bits(got, want)
    assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])
