"""``estimator="exact"`` repeats where the model rounds, or refuses."""

from __future__ import annotations

import pytest
import torch
from matching import (
    BF16,
    DTYPES,
    F32,
    SPELLINGS,
    Model,
    NormFunction,
    Spelling,
    assert_same_bits,
    assert_skipped,
    cast_reference,
    expected_warnings,
    in_its_own_dtype,
    inputs,
    mean_square,
    narrowed_first,
    olmo,
    only_site,
    power_without_keepdim,
    run,
    spellings,
)
from torch import Tensor

from mxnorm_pass import SkipReason, functional

pytestmark = expected_warnings


@pytest.mark.parametrize("dtypes", list(DTYPES.values()), ids=list(DTYPES))
@spellings("huggingface", "F.rms_norm", "olmo", "two upcasts")
def test_exact_changes_no_bit(spelling: Spelling, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_exact(spelling, *dtypes)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_exact_changes_no_bit_without_a_gain(dtype: torch.dtype) -> None:
    check_exact(SPELLINGS["F.rms_norm without gain"], dtype, dtype)


def check_exact(spelling: Spelling, dtype: torch.dtype, gain_dtype: torch.dtype) -> None:
    model, x = spelling.model(dtype=dtype, gain_dtype=gain_dtype), inputs(dtype=dtype)
    got, report = run(model, x, estimator="exact")
    site = only_site(report)
    assert (site.status, site.estimator) == ("fused", "exact"), str(site)
    assert_same_bits(got, cast_reference(model, x))


@pytest.mark.parametrize(
    "function", [in_its_own_dtype, power_without_keepdim], ids=lambda f: f.__name__
)
def test_exact_refuses_what_it_cannot_repeat(function: NormFunction) -> None:
    model, x = Model(function, dtype=BF16), inputs(dtype=BF16)
    got, report = run(model, x, estimator="exact")
    assert_skipped(report, SkipReason.ROUNDING)
    assert_same_bits(got, cast_reference(model, x))


def squares_in_bf16(x: Tensor, w: Tensor, eps: float) -> Tensor:
    mean = x.pow(2).mean(-1, keepdim=True, dtype=torch.float32)
    return x * torch.rsqrt(mean + eps) * w


def mean_in_bf16(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x).float()) * w


def gain_after_a_round_trip(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(mean_square(h) + eps)).to(BF16).float() * w


@pytest.mark.parametrize(
    "function, dtype, gain_dtype, reason",
    [
        (squares_in_bf16, BF16, F32, SkipReason.ROUNDING),
        (mean_in_bf16, BF16, F32, SkipReason.ROUNDING),
        (narrowed_first, F32, F32, None),
        (gain_after_a_round_trip, BF16, BF16, SkipReason.ROUNDING),
    ],
    ids=lambda p: getattr(p, "__name__", str(p)),
)
def test_exact_and_unusual_roundings(
    function: NormFunction,
    dtype: torch.dtype,
    gain_dtype: torch.dtype,
    reason: SkipReason | None,
) -> None:
    """None of these computes in float32 throughout."""
    model, x = Model(function, dtype=F32, gain_dtype=gain_dtype), inputs(dtype=dtype, scale=1.0)
    got, report = run(model, x, estimator="exact")
    assert only_site(report).reason == reason
    assert_same_bits(got, cast_reference(model, x))


class RoundedOnTheWay(Model):
    """Each linear upcasts a bf16 norm output for itself."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x).to(BF16)
        return self.first(y.float()), self.second(y.float())


class TwoDtypes(Model):
    """The first linear is bf16, the second fp32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.first(y.to(BF16)), self.second(y)


@pytest.mark.parametrize("kind", [RoundedOnTheWay, TwoDtypes])
def test_exact_rounds_for_each_consumer(kind: type[Model]) -> None:
    model, x = kind(olmo), inputs(scale=1.0)
    if kind is TwoDtypes:
        model.first.to(BF16)
    got, _ = run(model, x, estimator="exact")
    with torch.no_grad():
        y = model.norm(x)
        rounded = y.to(BF16)
        operands = (rounded, y) if kind is TwoDtypes else (rounded.float(),) * 2
        linears = (model.first, model.second)
        want = [
            functional.mx_linear(operand, m.weight, m.bias)
            for operand, m in zip(operands, linears, strict=True)
        ]
    assert_same_bits(got, want)
