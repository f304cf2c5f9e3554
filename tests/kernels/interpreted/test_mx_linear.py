"""The kernel of linears on MX operands, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_rows import DEVICE
from numerics import assert_bits_equal
from pairwise import each_value
from torch import Tensor

from mxnorm_pass.functional import block_format
from mxnorm_pass.kernels.mx_linear import LinearTiling, configuration, mx_linear
from mxnorm_pass.numerics.cast import Quantized

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
MXFP8 = block_format("mxfp8")
ONE, NAN_SCALE, NAN_ELEMENT = 127, 255, 0x7F


def operand(rows: int, width: int, seed: int, low: int = 100, high: int = 140) -> Quantized:
    """Every finite element, subnormal ones too, under scales of 2^(low - 127) and more."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == NAN_ELEMENT] = 0
    shape = (rows, width // 32)
    scales = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
    return of_bytes(codes, scales)


def of_bytes(codes: Tensor, scales: Tensor) -> Quantized:
    values = codes.to(DEVICE).view(torch.float8_e4m3fn)
    return Quantized(values, scales.to(DEVICE).view(torch.float8_e8m0fnu), MXFP8)


def run(
    x: Quantized, weight: Quantized, bias: Tensor | None = None, dtype: torch.dtype = F32,
    config: LinearTiling | None = None,
) -> Tensor:  # fmt: skip
    operands = (x.values, x.scales, weight.values, weight.scales)
    return mx_linear(*operands, bias, dtype, config=config)


def wide(operand: Quantized) -> Tensor:
    scales = operand.scales.view(torch.uint8).to(F64).sub(127).exp2()
    return operand.values.to(F64) * scales.repeat_interleave(32, -1)


def assert_within_bound(y: Tensor, x: Quantized, weight: Quantized, blocks: int) -> None:
    a, b = wide(x), wide(weight)
    width = a.shape[-1]
    # Roundings in a row, of at most an ulp each as tensor cores truncate: 32 products, two scales,
    # one sum for each time that blocks are read, and those of the blocks.
    roundings = 34 + width // (32 * blocks) + math.log2(blocks)
    bound = roundings * 2.0**-23 * (a.abs() @ b.abs().t())
    assert ((y.to(F64) - a @ b.t()).abs() <= bound).all()


@each_value(rows=[1, 9, 33], columns=[16, 40], width=[128, 384])
def test_sums_in_float32(rows: int, columns: int, width: int) -> None:
    x, weight = operand(rows, width, 0), operand(columns, width, 1)
    y = run(x, weight)
    assert y.shape == (rows, columns) and y.dtype == F32
    assert_within_bound(y, x, weight, configuration(rows, columns, width).blocks)


def test_sums_of_more_than_14_bits() -> None:
    """As those of Hopper's products of float8 are not: they are 2^-14 off for each block."""
    x, weight = operand(16, 1024, 0, ONE, ONE + 1), operand(32, 1024, 1, ONE, ONE + 1)
    a, b = wide(x), wide(weight)
    error = (run(x, weight).to(F64) - a @ b.t()).norm()
    assert error <= 2.0**-21 * (a.abs() @ b.abs().t()).norm()


@pytest.mark.parametrize("config", [LinearTiling(8, 16, 4, 4, 2), LinearTiling(16, 64, 8, 4, 3)])
def test_tilings(config: LinearTiling) -> None:
    x, weight = operand(20, 512, 0), operand(72, 512, 1)
    assert_within_bound(run(x, weight, config=config), x, weight, config.blocks)


def test_bias_and_rounding() -> None:
    # Sums of few bits, so that all but the last rounding is exact: and that is to a tie, up.
    x = of_bytes(torch.full((2, 128), 0x38, dtype=torch.uint8), torch.full((2, 4), ONE).byte())
    weight = of_bytes(
        torch.full((16, 128), 0x38, dtype=torch.uint8), torch.full((16, 4), ONE).byte()
    )
    bias = torch.arange(16, dtype=BF16, device=DEVICE)
    y = run(x, weight, bias, BF16)
    assert y.dtype == BF16
    assert_bits_equal(y, (128 + bias).expand(2, 16).contiguous())


def test_special_scales_and_elements() -> None:
    codes = torch.zeros(4, 128, dtype=torch.uint8)
    codes[:, ::7] = 0x01
    scales = torch.full((4, 4), ONE, dtype=torch.uint8)
    codes[1, 40] = NAN_ELEMENT
    scales[2, 3] = NAN_SCALE
    scales[3] = 0
    weight, x = of_bytes(codes, scales), operand(3, 128, 0)
    y, want = run(x, weight), wide(x) @ wide(weight).t()
    assert y[:, 2].isnan().all() and not y[:, [0, 3]].isnan().any()
    # Triton's interpreter takes the element for 480.
    assert y[:, 1].isnan().all() or DEVICE == "cpu"
    # 2^-127 is a subnormal float32, and the sums are not.
    torch.testing.assert_close(y[:, 0].to(F64), want[:, 0], rtol=1e-5, atol=0)
    assert ((y[:, 3].to(F64) - want[:, 3]).abs() <= 128 * 2.0**-149).all()


def test_zero_times_large() -> None:
    zeros = of_bytes(torch.zeros(2, 128).byte(), torch.zeros(2, 4).byte())
    large = operand(16, 128, 0, 220, 221)
    assert (run(zeros, large) == 0).all()


def test_memory_around_is_not_read() -> None:
    """Rows and columns beyond the last are neither stored nor part of a sum."""
    x, weight = operand(5, 256, 0), operand(24, 256, 1)
    whole = run(x, weight)
    for i in range(24):
        one = Quantized(weight.values[i : i + 1], weight.scales[i : i + 1], MXFP8)
        assert_bits_equal(run(x, one), whole[:, i : i + 1].contiguous())
