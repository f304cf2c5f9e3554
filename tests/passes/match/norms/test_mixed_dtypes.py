"""Norms whose mean and product read x in different dtypes."""

from __future__ import annotations

import pytest
import torch
from matching import (
    BF16,
    Model,
    assert_fused,
    assert_same_bits,
    assert_skipped,
    cast_reference,
    expected_warnings,
    in_its_own_dtype,
    inputs,
    mean_square,
    only_site,
    reference,
    run,
    t5,
)
from torch import Tensor

from mxnorm_pass import SkipReason

pytestmark = expected_warnings


def mean_of_rounded(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x.to(BF16).float()) + eps) * w


def converted_first(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return in_its_own_dtype(x.to(BF16), w, eps)


@torch.no_grad()
def test_mean_alone_in_float32_is_repeated_exactly() -> None:
    model, x = Model(t5, dtype=BF16), inputs(dtype=BF16)
    got, report = run(model, x, estimator="exact")
    site = only_site(report)
    assert (site.status, site.estimator) == ("fused", "exact")
    assert_same_bits(got, cast_reference(model, x))


@pytest.mark.parametrize("train", [False, True])
def test_product_decides_which_x_is_normalised(train) -> None:
    model, x = Model(mean_of_rounded), inputs()
    got, report = run(model, x, train=train)
    assert_fused(report)
    assert_same_bits(got, reference(model, x, model.norm.weight))


@torch.no_grad()
def test_mean_of_a_rounded_x_is_not_repeated_exactly() -> None:
    model, x = Model(mean_of_rounded), inputs()
    got, report = run(model, x, estimator="exact")
    assert_skipped(report, SkipReason.ROUNDING)
    assert_same_bits(got, cast_reference(model, x))


@torch.no_grad()
def test_bf16_does_not_hold_float16() -> None:
    """As many bits, but not the same numbers: the norm's x is what was rounded."""
    model, x = Model(converted_first, dtype=BF16), inputs(dtype=torch.float16)
    got, report = run(model, x)
    assert_fused(report)
    assert_same_bits(got, reference(model, x.to(BF16), model.norm.weight))
    rounded = reference(model, x, model.norm.weight)
    assert not torch.equal(got[0], rounded[0])
