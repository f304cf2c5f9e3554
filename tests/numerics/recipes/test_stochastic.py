"""Stochastic rounding against all elements of a format, by counting numbers that round up."""

from __future__ import annotations

import pytest
import torch
from numerics import normal
from torch import Tensor

from mxnorm_pass.numerics.cast import cast_blocks, mx_cast, mx_dequantize
from mxnorm_pass.numerics.elements import element_values, round_to_elements
from mxnorm_pass.numerics.formats import CAST_MODES, ELEMENTS, BlockFormat, CastMode, ElementFormat
from mxnorm_pass.numerics.stochastic import headroom, round_stochastically

STRATA = 64
all_elements = pytest.mark.parametrize("element", ELEMENTS.values(), ids=list(ELEMENTS))
F32 = torch.float32


def strata() -> Tensor:
    """Numbers that are as far apart as can be: [STRATA, 1]."""
    return (torch.arange(STRATA) * (2**16 // STRATA)).unsqueeze(-1)


def grid(element: ElementFormat) -> Tensor:
    """Every value of the format that is not negative, ascending, in float64."""
    codes = torch.arange(1 << (element.bits - 1)).to(torch.uint8)
    if element.bits == 8:
        values = codes.view(element.dtype).double()
        return values[values.isfinite()]
    if element.per_byte == 2:
        codes = codes[::2] | (codes[1::2] << 4)
    return element_values(codes, element, torch.float64)


def rounded(x: Tensor, numbers: Tensor, element: ElementFormat) -> Tensor:
    x = x.to(F32).expand(torch.broadcast_shapes(x.shape, numbers.shape))
    codes = round_to_elements(x, element, numbers.expand(x.shape))
    return element_values(codes, element, F32).double()


@all_elements
def test_the_mean_over_all_numbers_is_the_number(element: ElementFormat) -> None:
    values = grid(element)
    fractions = torch.arange(STRATA, dtype=torch.float64) / STRATA
    below, step = values[:-1, None], values.diff().unsqueeze(-1)
    # Mantissa and fraction have few bits, so they are exact in float32.
    x = (below + step * fractions).flatten()
    for number in (x, -x):
        got = rounded(number, strata(), element)
        assert torch.equal(got.mean(0), number)
        assert torch.equal(got.abs().amin(0), (below + 0 * fractions).flatten())
        nearest_up = torch.where(fractions > 0, below + step, below).flatten()
        assert torch.equal(got.abs().amax(0), nearest_up)


@all_elements
def test_values_of_the_format_stay_whatever_the_numbers(element: ElementFormat) -> None:
    values = grid(element)
    values = torch.cat([values, -values])
    for number in (0, 1, 2**15, 2**16 - 1):
        assert torch.equal(rounded(values, torch.tensor([number]), element), values)


@all_elements
def test_beyond_the_largest_value_it_saturates(element: ElementFormat) -> None:
    x = torch.tensor([element.max * 1.01, torch.inf, -torch.inf, torch.finfo(F32).max])
    want = torch.tensor([1, 1, -1, 1]).double() * element.max
    assert torch.equal(rounded(x, torch.tensor([0]), element), want)


@all_elements
def test_nan_is_nan_where_there_is_one(element: ElementFormat) -> None:
    x = torch.tensor([torch.nan, -torch.nan])
    got = rounded(x, torch.tensor([0]), element)
    assert got.isnan().all() if element.bits == 8 else not got.any()


@pytest.mark.parametrize("fraction", [0.0, 2.0**-149, 2.0**-18, 2.0**-17, 0.3, 0.5, 1 - 2.0**-20])
def test_the_probability_is_within_2_to_the_minus_17(fraction: float) -> None:
    numbers = torch.arange(2**16)
    x = torch.tensor(3 + fraction if fraction > 2.0**-20 else fraction)
    up = round_stochastically(x.expand(numbers.shape), numbers) > x.floor()
    assert abs(up.double().mean().item() - x.double().frac().item()) <= 2.0**-17
    assert not up.any() or x.frac() > 0


@pytest.mark.parametrize(
    "element, mode, factor",
    [
        ("e2m1", "floor", 3 / 4),
        ("e4m3fn", "floor", 7 / 8),
        ("e5m2", "even", 7 / 8),
        ("e2m1", "rceil", 1.0),
        ("e2m1", "ceil", 1.0),
    ],
)
def test_headroom(element: str, mode: CastMode, factor: float) -> None:
    assert headroom(BlockFormat(ELEMENTS[element], mode)) == factor


def blocks_that_nearly_overflow() -> Tensor:
    """[K, 1, 32] whose absmax is, of every power of two, the largest number below it."""
    below = torch.nextafter(torch.exp2(torch.arange(-40.0, 41.0)), torch.tensor(0.0))
    return below[:, None, None] * torch.cat([torch.ones(1), normal(31).tanh()])


@pytest.mark.parametrize("mode", [mode for mode in CAST_MODES if mode != "rceil-log2"])
@all_elements
def test_nothing_saturates(element: ElementFormat, mode: CastMode) -> None:
    fmt = BlockFormat(element, mode)
    x = blocks_that_nearly_overflow()
    absmax = x.abs().amax(-1, keepdim=True)
    numbers = strata().expand(STRATA, 32)
    means = []
    for block, largest in zip(x, absmax, strict=True):
        many = cast_blocks(block.expand(STRATA, 1, 32), largest, fmt, None, numbers.unsqueeze(1))
        scales = many.scales.expand(STRATA, 1)
        back = mx_dequantize(many.values, scales, block_size=32, format=fmt)
        means.append(back.double().mean(0))
    want = x.flatten(1).double() * headroom(fmt)
    # The strata's mean is the number to within a step / STRATA, or it has saturated.
    step = absmax.flatten(1).double() * 2.0**-element.mantissa_bits
    assert ((torch.stack(means) - want).abs() <= step / STRATA).all()


def test_without_headroom_it_would_saturate() -> None:
    x = blocks_that_nearly_overflow()
    fmt = BlockFormat(ELEMENTS["e2m1"], "floor")
    back = mx_dequantize(*mx_cast(x, fmt), format=fmt)
    lost = (back[..., 0].abs() / x[..., 0].abs()).amax()
    assert lost == pytest.approx(6 / 8)
