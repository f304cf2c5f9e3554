"""Linears on MX operands by either kernel, one and several of an x, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_rows import DEVICE
from mx_linears import (
    F32,
    F64,
    MXFP8,
    NAN_ELEMENT,
    NAN_SCALE,
    ONE,
    assert_within_bound,
    of_bytes,
    operand,
    run,
    run_all,
    wide,
)
from numerics import assert_bits_equal
from pairwise import each_value
from torch import Tensor

from mxnorm_pass.numerics.cast import Quantized

BF16 = torch.bfloat16


@each_value(rows=[1, 9, 33], columns=[16, 41], width=[128, 384, 512, 640, 1024])
def test_sums_in_float32(rows: int, columns: int, width: int) -> None:
    x, weight = operand(rows, width, 0), operand(columns, width, 1)
    y = run(x, weight)
    assert y.shape == (rows, columns) and y.dtype == F32
    assert_within_bound(y, x, weight)


# Fewer than a tile has, as many and more; four are two launches.
@each_value(
    rows=[1, 2, 20],
    columns=[(16, 16), (41, 5), (64, 16, 16), (5, 41, 33), (17, 1, 70), (8, 9, 10, 11)],
    width=[128, 512],
    biased=[False, True],
)
def test_several_of_one_x(rows: int, columns: tuple[int, ...], width: int, biased: bool) -> None:
    x = operand(rows, width, 0)
    weights = [operand(n, width, 1 + i) for i, n in enumerate(columns)]
    biases = [torch.linspace(-2, i, n, device=DEVICE) for i, n in enumerate(columns)]
    given: list[Tensor | None] = [*biases] if biased else [None] * len(columns)
    results = run_all(x, weights, given)
    for y, weight, bias in zip(results, weights, given, strict=True):
        assert y.shape == (rows, weight.values.shape[0])
        assert_within_bound(y, x, weight, bias)


def test_sums_of_more_than_14_bits() -> None:
    """As those of Hopper's products of float8 are not: they are 2^-14 off for each block."""
    for rows in (1, 16):
        x, weight = operand(rows, 1024, 0, ONE, ONE + 1), operand(32, 1024, 1, ONE, ONE + 1)
        a, b = wide(x), wide(weight)
        error = (run(x, weight).to(F64) - a @ b.t()).norm()
        assert error <= 2.0**-21 * (a.abs() @ b.abs().t()).norm()


@pytest.mark.parametrize("rows", [1, 2])
def test_bias_and_rounding(rows: int) -> None:
    # Sums of few bits are exact.
    def ones(count: int) -> Quantized:
        scales = torch.full((count, 4), ONE, dtype=torch.uint8)
        return of_bytes(torch.full((count, 128), 0x38, dtype=torch.uint8), scales)

    bias = torch.arange(16, dtype=BF16, device=DEVICE)
    y = run(ones(rows), ones(16), bias, BF16)
    assert y.dtype == BF16
    assert_bits_equal(y, (128 + bias).expand(rows, 16).contiguous())


@pytest.mark.parametrize("rows", [1, 3])
def test_special_scales_and_elements(rows: int) -> None:
    codes = torch.zeros(4, 128, dtype=torch.uint8)
    codes[:, ::7] = 0x01
    scales = torch.full((4, 4), ONE, dtype=torch.uint8)
    codes[1, 40] = NAN_ELEMENT
    scales[2, 3] = NAN_SCALE
    scales[3] = 0
    weight, x = of_bytes(codes, scales), operand(rows, 128, 0)
    y, want = run(x, weight), wide(x) @ wide(weight).t()
    assert y[:, 2].isnan().all() and not y[:, [0, 3]].isnan().any()
    # Triton's interpreter, which runs the kernel of one row, takes the element for 480.
    assert y[:, 1].isnan().all() or (DEVICE == "cpu" and rows == 1)
    # 2^-127 is a subnormal float32, and the sums are not.
    torch.testing.assert_close(y[:, 0].to(F64), want[:, 0], rtol=1e-5, atol=0)
    assert ((y[:, 3].to(F64) - want[:, 3]).abs() <= 128 * 2.0**-149).all()


@pytest.mark.parametrize("block", range(4))
def test_scales_of_x_that_are_nan(block: int) -> None:
    """In any byte of a word; only its row is NaN."""
    x, weight = operand(3, 512, 0), operand(20, 512, 1)
    x.scales.view(torch.uint8)[1, 4 + block] = NAN_SCALE
    one = Quantized(x.values[1:2], x.scales[1:2], MXFP8)
    y = run(x, weight)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    assert run(one, weight).isnan().all()


@pytest.mark.parametrize("rows", [1, 2])
def test_zero_times_large(rows: int) -> None:
    zeros = of_bytes(torch.zeros(rows, 128).byte(), torch.zeros(rows, 4).byte())
    large = operand(16, 128, 0, 220, 221)
    assert (run(zeros, large) == 0).all()


@pytest.mark.parametrize("rows", [1, 5])
def test_memory_around_is_not_read(rows: int) -> None:
    """Rows and columns beyond the last are neither stored nor part of a sum."""
    x, weight = operand(rows, 256, 0), operand(6, 256, 1)
    whole = run(x, weight)
    for i in range(6):
        one = Quantized(weight.values[i : i + 1], weight.scales[i : i + 1], MXFP8)
        assert_bits_equal(run(x, one), whole[:, i : i + 1].contiguous())
