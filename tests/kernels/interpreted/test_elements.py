"""Rounding to elements on a GPU, or in the interpreter, against ``numerics``, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from edge_cases import bits_equal, describe_difference
from kernel_rows import DEVICE, F32
from numerics import generator
from torch import Tensor

from mxnorm_pass.kernels.device.elements import round_to_element, to_elements
from mxnorm_pass.kernels.rows import TRITON_DTYPES, converts
from mxnorm_pass.numerics.elements import element_values, round_to_elements
from mxnorm_pass.numerics.formats import ELEMENTS, ElementFormat, ScaleMode

BLOCK = 32


@triton.jit
def round_kernel(
    x_ptr,
    factor_ptr,
    elements_ptr,
    rounded_ptr,
    K: tl.constexpr,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    k = tl.arange(0, K)
    at = k[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    factor = tl.load(factor_ptr + k)[None, :]
    x = tl.load(x_ptr + at)
    elements = to_elements(x, factor, MODE, DTYPE, BITS, MANTISSA_BITS, LARGEST, CONVERTS)
    PER_BLOCK: tl.constexpr = 4 if BITS == 4 else 32
    pieces = k[None, :, None] * PER_BLOCK + tl.arange(0, PER_BLOCK)[None, None, :]
    tl.store(elements_ptr.to(tl.pointer_type(elements.dtype), bitcast=True) + pieces, elements)
    if BITS < 8:
        tl.store(rounded_ptr + at, round_to_element(x, BITS, MANTISSA_BITS, LARGEST))


def rounded(
    x: Tensor,
    factor: Tensor,
    element: ElementFormat,
    by_hardware: bool,
    mode: ScaleMode = "floor",
) -> tuple[Tensor, Tensor]:
    """Elements of ``x`` times ``factor``; and the values of ``x``'s in less than 8 bits."""
    there, factor = x.to(DEVICE), factor.to(DEVICE)
    elements = torch.empty(len(x) // element.per_byte, dtype=element.dtype, device=DEVICE)
    values = torch.empty_like(there)
    blocks, dtype = len(x) // BLOCK, TRITON_DTYPES[element.dtype]
    constants = (element.bits, element.mantissa_bits, element.max, by_hardware)
    round_kernel[(1,)](there, factor, elements, values, blocks, mode, dtype, *constants)
    return elements.cpu(), values.cpu()


def numbers(element: ElementFormat) -> Tensor:
    """Multiples of a fourth of the smallest step, their neighbours, and any bit patterns."""
    step = 2.0 ** (element.min_exponent - element.mantissa_bits - 2)
    near = torch.arange(0, min(4 * element.max, 2048 * step), step)
    near = torch.cat([near, near * element.max / near.max()])
    up, down = (torch.nextafter(near, torch.full_like(near, to)) for to in (torch.inf, 0.0))
    near = torch.cat([near, up, down])
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), generator=generator(), dtype=torch.int64)
    special = torch.tensor([0.0, torch.inf, torch.finfo(F32).max, 2.0**-149])
    x = torch.cat([special, near, bits.to(torch.int32).view(F32).nan_to_num(0.0)])[: 1 << 15]
    x = torch.nn.functional.pad(x, (0, (1 << 15) - len(x)))
    return torch.cat([x, -x])


HARDWARE = [False, True] if DEVICE == "cuda" and converts(torch.device(DEVICE)) else [False]


@pytest.mark.parametrize("by_hardware", HARDWARE)
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=list(ELEMENTS))
def test_every_tie_and_its_neighbours(element: ElementFormat, by_hardware: bool) -> None:
    x = numbers(element)
    got, values = rounded(x, torch.ones(len(x) // BLOCK), element, by_hardware)
    want = round_to_elements(x, element)
    assert bits_equal(got, want), describe_difference(got, want)
    if element.bits < 8:
        want = element_values(want, element, F32)
        assert bits_equal(values, want), describe_difference(values, want)


@pytest.mark.parametrize("mode", ["rceil", "nearest"])
@pytest.mark.parametrize("factor", [1.0, 0.3, 2.0**-100, 1.9 * 2.0**100])
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=list(ELEMENTS))
def test_products_are_rounded_first(element: ElementFormat, factor: float, mode: ScaleMode) -> None:
    """To float32, and only then to elements; below 2**-123 nobody's factor is."""
    x = numbers(element) / factor
    factors = torch.full((len(x) // BLOCK,), factor)
    got, _ = rounded(x, factors, element, False, mode)
    want = round_to_elements(x * factors[0], element)
    assert bits_equal(got, want), describe_difference(got, want)


@pytest.mark.parametrize("by_hardware", HARDWARE)
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=list(ELEMENTS))
def test_blocks_whose_scale_is_nan(element: ElementFormat, by_hardware: bool) -> None:
    """All elements are then NaN, or, where the factor is 0, zeros with their signs and NaN."""
    zeros = torch.tensor([0.0, -0.0, torch.nan, -0.0]).repeat(BLOCK // 4)
    x = torch.cat([zeros, torch.full((BLOCK,), torch.nan)])
    got, _ = rounded(x, torch.tensor([0.0, torch.nan]), element, by_hardware)
    want = round_to_elements(x, element)
    assert bits_equal(got, want), describe_difference(got, want)


@pytest.mark.parametrize("by_hardware", HARDWARE)
@pytest.mark.parametrize("mode", ["rceil", "nearest"])
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=list(ELEMENTS))
def test_blocks_that_become_nan(element: ElementFormat, mode: ScaleMode, by_hardware: bool) -> None:
    """Whatever was there before, of which nothing is left, no sign either."""
    x = torch.tensor([1.0, -1.0, -0.0, -torch.inf, torch.nan, -6.0, 0.0, 1e38]).repeat(BLOCK // 8)
    got, _ = rounded(x, torch.tensor([torch.nan]), element, by_hardware, mode)
    want = round_to_elements(x * torch.nan, element)
    assert bits_equal(got, want), describe_difference(got, want)
