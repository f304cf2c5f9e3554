"""The row kernel's casts against ``functional``, bit for bit under the kernel's own rho."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from edge_cases import STACKED_EDGE_CASES, EdgeCase
from kernel_rows import (
    BF16,
    E4M3,
    E5M2,
    EPS,
    F16,
    F32,
    assert_cast_equals,
    assert_same_bits,
    kernel,
    launched,
    reference,
    spec,
)
from numerics import U, gain, normal
from pairwise import each_value, pairwise
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.kernels.rows import RowTiling
from mxnorm_pass.numerics.formats import SCALE_MODES
from mxnorm_pass.numerics.layout import blocked_scales

ESTIMATORS: dict[str, dict[str, Any]] = {
    "p=2": {},
    "p=1": {"p": 1.0},
    "p=0.5": {"p": 0.5},
    "p=1.5": {"p": 1.5},
    "p=3": {"p": 3.0},
    "exact": {"estimator": "exact"},
}
GAINS = {"no_gain": None, "bf16_gain": BF16, "fp16_gain": F16, "fp32_gain": F32}
DTYPES = {"bf16": BF16, "fp16": F16, "fp32": F32}
# The interpreter takes its time for each program.
MANY_ROWS = RowTiling(128, 1, 8)
# Five blocks: no power of two, as the tile is.
WIDTH = 160


def gain_of(dtype: torch.dtype | None, width: int = WIDTH) -> Tensor | None:
    return None if dtype is None else gain(width, dtype)


def block_weights_of(blocks: int) -> Tensor:
    """Some blocks weigh nothing; the others are far from equal."""
    weights = gain(blocks, F32, 0.0, 2.0 / blocks)
    weights[::3] = 0.0
    return weights


@pairwise(dtype=DTYPES, gain_dtype=GAINS, estimator=ESTIMATORS)
def test_cast(
    estimator: dict[str, Any], gain_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    assert_cast_equals(normal(5, WIDTH, dtype=dtype), gain_of(gain_dtype), spec(**estimator))


@each_value(estimator=ESTIMATORS, block_size=[16, 32, 64, 128])
def test_block_sizes(estimator: dict[str, Any], block_size: int) -> None:
    x = normal(3, 384, dtype=BF16)
    assert_cast_equals(x, gain_of(BF16, 384), spec(**estimator, block_size=block_size))


@each_value(blocks=[1, 4, 5], rows=[1, 3, 127, 128, 129, 300])
def test_blocked_scales_are_padded_with_zeros(rows: int, blocks: int) -> None:
    x, config = normal(rows, 32 * blocks, dtype=BF16), RowTiling(64, 1, 8)
    # Without eps a row of nothing but padding would be 0 / 0.
    blocked = kernel(x, None, spec(scale_layout="blocked", eps=0.0), config=config)
    plain = kernel(x, None, spec(eps=0.0), config=config)
    expected = blocked_scales(plain.scales.view(torch.uint8))
    assert torch.equal(blocked.scales.view(torch.uint8), expected)
    assert_same_bits(blocked.values, plain.values, "values")


@pairwise(gain_dtype=GAINS, out_dtype=[BF16, F16, F32], norm_dtype=[None, BF16, F16, F32])
def test_exact_norm_rounds_where_the_graph_did(
    norm_dtype: torch.dtype | None, out_dtype: torch.dtype, gain_dtype: torch.dtype | None
) -> None:
    rounding = {"estimator": "exact", "norm_dtype": norm_dtype, "out_dtype": out_dtype}
    assert_cast_equals(normal(5, WIDTH), gain_of(gain_dtype), spec(**rounding))


@pytest.mark.parametrize("norm_dtype", [None, BF16, F16])
@pytest.mark.parametrize("out_dtype", [BF16, F32])
def test_estimate_rounds_once(norm_dtype: torch.dtype | None, out_dtype: torch.dtype) -> None:
    x, weight = normal(5, WIDTH), gain_of(BF16)
    once = kernel(x, weight, spec())
    again = kernel(x, weight, spec(norm_dtype=norm_dtype, out_dtype=out_dtype))
    for name, a, b in zip(once._fields, again, once, strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_block_weights(p: float, weighted: bool) -> None:
    x, weights = normal(5, WIDTH, dtype=BF16), block_weights_of(5)
    weight = gain_of(BF16) if weighted else None
    assert_cast_equals(x, weight, spec(p=p), block_weights=weights)


EDGE_SPECS: dict[str, dict[str, Any]] = {
    "estimate": {},
    "estimate_p": {"p": 1.5},
    "exact": {"estimator": "exact", "norm_dtype": None, "out_dtype": F32},
    "exact_bf16": {"estimator": "exact"},
}


@pairwise(name=list(EDGE_SPECS), dtype={"bf16": BF16, "fp32": F32}, case=STACKED_EDGE_CASES)
def test_edge_cases(case: EdgeCase, dtype: torch.dtype, name: str) -> None:
    x = case.x(dtype)
    weight = gain_of(F32, x.shape[-1]) if name == "exact_bf16" else None
    # All modes where they meet every special value; elsewhere the two that carry.
    modes = SCALE_MODES if name == "estimate" else ("rceil", "even")
    for i, mode in enumerate(modes):
        elem_dtype = (E4M3, E5M2)[(i + (dtype == F32)) % 2]
        options = spec(**EDGE_SPECS[name], scale_mode=mode, elem_dtype=elem_dtype)
        actual = assert_cast_equals(x, weight, options, config=MANY_ROWS)
        assert_specials_equal(actual.rho, reference(x, weight, options).rho)


def assert_specials_equal(rho: Tensor, expected: Tensor) -> None:
    """NaN, infinity and zero at the same rows; what lies between has tests of its own."""
    for special in (torch.isnan, torch.isinf, lambda t: t == 0):
        assert torch.equal(special(rho), special(expected)), f"{rho} {expected}"
    torch.testing.assert_close(rho, expected, rtol=1e-5, atol=0, equal_nan=True)


@pairwise(elem_dtype={"e4m3": E4M3, "e5m2": E5M2}, mode=SCALE_MODES, estimator=["mxnorm", "exact"])
def test_special_gains(estimator: Any, mode: str, elem_dtype: torch.dtype) -> None:
    """A gain makes infinite, huge and tiny blocks of a row whose inverse RMS is ordinary."""
    weight = gain(WIDTH)
    for block, value in enumerate((math.inf, -math.inf, math.nan, 1e38, 1e-40)):
        weight[32 * block + 7] = value
    weight[128:] *= 1e-38
    rounding = {"norm_dtype": None, "out_dtype": F32}
    options = spec(estimator=estimator, scale_mode=mode, elem_dtype=elem_dtype, **rounding)
    x = normal(5, WIDTH)
    assert_cast_equals(x, weight, options)
    dequantized, *_ = launched(x, weight, options, dequantize=F32)
    quantized = kernel(x, weight, options)
    expected = functional.mx_dequantize(quantized.values, quantized.scales, F32)
    assert_same_bits(dequantized, expected, "dequantized")


@pytest.mark.full
@pytest.mark.parametrize("p", [2.0, 1.5, 3.0])
def test_chunks_of_very_different_size(p: float) -> None:
    """What a chunk leaves behind survives a chunk that is larger by any factor."""
    first = torch.tensor([math.inf, math.nan, 3e38, 1e-30, 0.0])
    x = normal(2 * len(first), 256)
    x[:, :128] *= 1e-25
    x[:, 128:] *= 1e12
    x[::2, 3] = first
    options = spec(p=p)
    for config in (RowTiling(8, 1, 4), RowTiling(16, 2, 4), RowTiling(1, 8, 4)):
        actual = assert_cast_equals(x, None, options, config=config)
        assert_specials_equal(actual.rho, reference(x, None, options).rho)


def test_saturation() -> None:
    """FLOOR leaves up to 511 under a scale whose largest element is 448."""
    x = normal(4, 128)
    x[:, 5::32] = 1.99
    values = kernel(x, None, spec(scale_mode="floor", eps=0.0)).values.float()
    assert values[:, 5::32].eq(448.0).any()
    assert_cast_equals(x, None, spec(scale_mode="floor", eps=0.0))


@each_value(residual_dtype=DTYPES, x_dtype=DTYPES)
def test_residual(x_dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    x, residual = normal(5, WIDTH, dtype=x_dtype), normal(5, WIDTH, seed=1, dtype=residual_dtype)
    for estimator, config in (("mxnorm", RowTiling(8, 1, 4)), ("exact", RowTiling(8, 4, 4))):
        options = spec(estimator=estimator)
        total, *results = launched(x, gain_of(BF16), options, residual=residual, config=config)
        assert_same_bits(total, x + residual, "total")
        of_total = kernel(x + residual, gain_of(BF16), options, config=config)
        for name, actual, expected in zip(of_total._fields, results, of_total, strict=True):
            assert_same_bits(actual, expected, name)


@pytest.mark.full
@pytest.mark.parametrize("case", STACKED_EDGE_CASES, ids=str)
def test_residual_of_edge_cases(case: EdgeCase) -> None:
    for dtype in (BF16, F32):
        x = case.x(dtype)
        total, *_ = launched(x, None, spec(), residual=x.flip(0), config=MANY_ROWS)
        assert_same_bits(total, x + x.flip(0), "total")


@each_value(case=STACKED_EDGE_CASES, dtype=DTYPES)
def test_dequantized(case: EdgeCase, dtype: torch.dtype) -> None:
    x, config = case.x(F32), MANY_ROWS
    for options in (spec(), spec(scale_mode="floor", elem_dtype=E5M2, estimator="exact")):
        dequantized, rho = launched(x, None, options, dequantize=dtype, config=config)
        quantized = reference(x, None, options, rho=rho)
        expected = functional.mx_dequantize(quantized.values, quantized.scales, dtype)
        assert_same_bits(dequantized, expected, "dequantized")
        assert_specials_equal(rho, reference(x, None, options).rho)


def test_dequantized_with_residual_and_gain() -> None:
    x, residual, weight = normal(5, WIDTH, dtype=BF16), normal(5, WIDTH, seed=1), gain_of(BF16)
    options = spec()
    total, dequantized, rho = launched(x, weight, options, residual=residual, dequantize=BF16)
    quantized = reference(x + residual, weight, options, rho=rho)
    expected = functional.mx_dequantize(quantized.values, quantized.scales, BF16)
    assert_same_bits(total, x + residual, "total")
    assert_same_bits(dequantized, expected, "dequantized")
    assert_specials_equal(rho, reference(x + residual, weight, options).rho)


def test_zero_rows_stay_finite() -> None:
    actual = kernel(torch.zeros(2, 64), None, spec())
    assert torch.equal(actual.values.float(), torch.zeros(2, 64))
    expected = torch.full((2, 1), 1 / math.sqrt(EPS))
    torch.testing.assert_close(actual.rho, expected, rtol=4 * U, atol=0)
