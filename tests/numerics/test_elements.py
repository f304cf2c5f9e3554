"""Elements of 6 and 4 bits, and casts to them, against torchao and the OCP MX specification."""

from __future__ import annotations

import pytest
import torch
from edge_cases import BLOCK_SIZE, EDGE_CASES, EdgeCase, bits_equal, describe_difference
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import pack_uint4, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

from mxnorm_pass import functional, ops
from mxnorm_pass.numerics.elements import element_values, round_to_elements
from mxnorm_pass.numerics.formats import ELEMENTS, SCALE_MODES, ElementFormat, block_format

SMALL = {name: element for name, element in ELEMENTS.items() if element.bits < 8}
EXPONENT_BITS = {"e2m3": 2, "e3m2": 3, "e2m1": 2}
TORCHAO = {"e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "e2m1": torch.float4_e2m1fn_x2}
INPUTS = {"fp32": torch.float32, "bf16": torch.bfloat16}

small_elements = pytest.mark.parametrize("element", SMALL.values(), ids=list(SMALL))
# torchao's RCEIL of float32 is "rceil-log2".
MODES = {
    f"{mode}-{name}": (f"{mode}-log2" if (mode, name) == ("rceil", "fp32") else mode, dtype)
    for mode in SCALE_MODES
    for name, dtype in INPUTS.items()
}
all_modes = pytest.mark.parametrize("mode, dtype", MODES.values(), ids=list(MODES))


def codes_of(element: ElementFormat) -> Tensor:
    """Every code, as values are held."""
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    return pack_uint4(codes) if element.bits == 4 else codes


def test_four_bits_are_those_of_the_specification() -> None:
    # OCP MX specification v1.0, section 5.3.3.
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = element_values(codes_of(ELEMENTS["e2m1"]), ELEMENTS["e2m1"], torch.float32)
    assert values.tolist() == positive + [-v for v in positive]
    assert torch.signbit(values).tolist() == 8 * [False] + 8 * [True]


@small_elements
def test_every_code_is_read_as_torchao_reads_it(element: ElementFormat) -> None:
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    sizes = (EXPONENT_BITS[element.name], element.mantissa_bits)
    values = element_values(codes_of(element), element, torch.float32)
    assert bits_equal(values, _floatx_unpacked_to_f32(codes, *sizes))
    assert values.max() == element.max


@small_elements
def test_every_value_and_every_tie_is_rounded_to_even(element: ElementFormat) -> None:
    codes = codes_of(element)
    values = element_values(codes, element, torch.float32)
    assert torch.equal(round_to_elements(values, element), codes)
    positive = values[: len(values) // 2]
    ties = (positive[:-1] + positive[1:]) / 2
    odd = torch.arange(len(ties)) % 2 == 1
    for x, want in (
        (ties, torch.where(odd, positive[1:], positive[:-1])),
        (torch.nextafter(ties, torch.tensor(torch.inf)), positive[1:]),
        (torch.nextafter(ties, torch.tensor(0.0)), positive[:-1]),
    ):
        # An even number of them, so that two share a byte.
        x, want = x.repeat(2), want.repeat(2)
        got = element_values(round_to_elements(x, element), element, torch.float32)
        assert torch.equal(got, want)
        got = element_values(round_to_elements(-x, element), element, torch.float32)
        assert torch.equal(got, -want)


def test_what_is_no_number_takes_zero() -> None:
    x = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])
    for element in SMALL.values():
        got = element_values(round_to_elements(x, element), element, torch.float32)
        assert got.tolist() == [0.0, 0.0, element.max, -element.max]
        # Whatever sign the hardware gives a NaN that it computes.
        assert not torch.signbit(got[:2]).any()


@small_elements
@settings(max_examples=examples(100), deadline=None, derandomize=True)
@given(data=st.binary(min_size=256, max_size=256))
def test_rounding_is_torchaos(element: ElementFormat, data: bytes) -> None:
    x = torch.frombuffer(bytearray(data), dtype=torch.float32)
    # Half of them within the range of the elements.
    near = torch.frexp(x).mantissa * element.max * 2.0 ** -torch.arange(64).remainder(6)
    x = torch.where(torch.arange(64) % 2 == 0, near, x).nan_to_num(1.0)
    codes = _f32_to_floatx_unpacked(x, EXPONENT_BITS[element.name], element.mantissa_bits)
    got = round_to_elements(x, element)
    assert torch.equal(unpack_uint4(got) if element.bits == 4 else got, codes)


@all_modes
@small_elements
@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_cast_equals_torchao(
    case: EdgeCase, element: ElementFormat, mode: str, dtype: torch.dtype
) -> None:
    x = case.x(dtype)
    fmt = block_format(f"mxfp{element.bits} {element.name} {mode} block {BLOCK_SIZE}")
    values, scales = functional.mx_cast(x, fmt)
    scale_mode = ScaleCalculationMode[mode.removesuffix("-log2").upper()]
    want_scales, want = to_mx(x, TORCHAO[element.name], BLOCK_SIZE, scale_mode)
    assert bits_equal(scales, want_scales), describe_difference(scales, want_scales)
    # What elements are in a block whose scale is NaN means nothing.
    known = ~torch.isnan(functional.mx_dequantize(values, scales, format=fmt))
    got_codes, codes = (unpack_uint4(v) if element.bits == 4 else v for v in (values, want))
    assert torch.equal(got_codes[known], codes[known])
    back = to_dtype(want, want_scales, TORCHAO[element.name], BLOCK_SIZE, torch.float32)
    got = functional.mx_dequantize(values, scales, format=fmt)
    assert bits_equal(got, back.reshape(got.shape)), describe_difference(got, back)


@small_elements
def test_the_ops_take_the_formats(element: ElementFormat) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = f"mxfp{element.bits} {element.name} rceil block 32"
    values, scales = ops.cast(x, name)
    assert values.shape == (3, 32 if element.bits == 4 else 64)
    assert torch.equal(values, functional.mx_cast(x, name)[0])
    back = ops.dequantize(values, scales, name, torch.float32)
    assert torch.equal(back, functional.mx_dequantize(values, scales, format=name))
    # Half a unit in the last place of the largest element of a block, or what saturates.
    step = 2.0 ** (element.max_exponent - element.mantissa_bits) / element.max
    assert (
        ((back - x.float()).abs().unflatten(-1, (-1, 32)).amax(-1))
        .le(step * x.float().abs().unflatten(-1, (-1, 32)).amax(-1))
        .all()
    )
    utilities = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.cast, (x, name), test_utils=utilities)
