"""MX casts against torchao's, bit for bit, and against the definition of the formats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from edge_cases import BLOCK_SIZE, EDGE_CASES, EdgeCase, bits_equal, describe_difference
from example_counts import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor, to_mx

from mxnorm_pass.functional import blocked_scales
from mxnorm_pass.numerics.cast import mx_cast, mx_dequantize
from mxnorm_pass.numerics.e8m0 import e8m0_exponent, e8m0_to_float, round_up_to_e8m0
from mxnorm_pass.numerics.formats import (
    CAST_MODES,
    ELEMENT_DTYPES,
    BlockFormat,
    CastMode,
    block_format,
    element_of,
)
from mxnorm_pass.numerics.norm_cast import mxnorm_cast

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
INPUT_DTYPES = (torch.float32, torch.bfloat16)
# torchao's RCEIL takes float32's log2; of a bfloat16 absmax that is exact.
LIKE_TORCHAO = {
    f"{mode}-{name}": (mode, dtype)
    for mode in CAST_MODES
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    if (mode, dtype) != ("rceil", torch.float32)
}

all_modes = pytest.mark.parametrize("mode", CAST_MODES)
all_elements = pytest.mark.parametrize("elem_dtype", [E4M3, E5M2], ids=["e4m3fn", "e5m2"])
all_inputs = pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=["fp32", "bf16"])
like_torchao = pytest.mark.parametrize(
    "mode, dtype", list(LIKE_TORCHAO.values()), ids=list(LIKE_TORCHAO)
)
all_edges = pytest.mark.parametrize("case", EDGE_CASES, ids=str)
# Seeded by the test's name, so that a failure in one run is a failure in each.
repeatable = settings(
    max_examples=examples(60),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def torchao_cast(
    x: Tensor, elem_dtype: torch.dtype, mode: CastMode, block_size: int = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    scale_mode = ScaleCalculationMode[mode.removesuffix("-log2").upper()]
    scales, values = to_mx(x, elem_dtype, block_size, scale_mode)
    return values, scales


def torchao_dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    block_size = values.shape[-1] // scales.shape[-1]
    tensor = MXTensor.from_qdata_and_scales(values, scales, dtype, block_size=block_size)
    return tensor.dequantize(dtype)


def assert_cast_equals_torchao(x: Tensor, elem_dtype: torch.dtype, mode: CastMode) -> None:
    values, scales = mx_cast(x, format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode))
    expected_values, expected_scales = torchao_cast(x, elem_dtype, mode)
    assert bits_equal(scales, expected_scales), describe_difference(scales, expected_scales)
    assert bits_equal(values, expected_values), describe_difference(values, expected_values)


@st.composite
def bit_patterns(draw: st.DrawFn, dtype: torch.dtype, finite: bool = False) -> Tensor:
    """[2, 64] of random bits; each block gets an upper limit to its exponents.

    Without the limit the largest of 32 random exponents is always close to the top of the range.
    """
    elements = 2 * 2 * BLOCK_SIZE
    data = draw(st.binary(min_size=elements * dtype.itemsize, max_size=elements * dtype.itemsize))
    limits = draw(st.lists(st.integers(0, 254 if finite else 255), min_size=4, max_size=4))
    integer, mantissa = {2: (torch.int16, 7), 4: (torch.int32, 23)}[dtype.itemsize]
    bits = torch.frombuffer(bytearray(data), dtype=integer).reshape(4, BLOCK_SIZE)
    exponent = (bits >> mantissa) & 0xFF
    capped = torch.minimum(exponent, torch.tensor(limits, dtype=integer)[:, None])
    bits = bits ^ ((exponent ^ capped) << mantissa)
    return bits.view(dtype).reshape(2, 2 * BLOCK_SIZE)


@like_torchao
@all_elements
@all_edges
def test_cast_equals_torchao(
    case: EdgeCase, mode: CastMode, elem_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    assert_cast_equals_torchao(case.x(dtype), elem_dtype, mode)


@like_torchao
@all_elements
@repeatable
@given(data=st.data())
def test_cast_equals_torchao_on_random_bits(
    data: st.DataObject, mode: CastMode, elem_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    assert_cast_equals_torchao(data.draw(bit_patterns(dtype)), elem_dtype, mode)


@all_elements
@all_modes
def test_cast_follows_leading_dimensions_and_strides(
    mode: CastMode, elem_dtype: torch.dtype
) -> None:
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = mx_cast(x, format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode))
    assert (values.shape, scales.shape) == (x.shape, (3, 5, 3))
    flat_values, flat_scales = torchao_cast(x.reshape(15, 96), elem_dtype, mode)
    assert bits_equal(values.reshape(15, 96), flat_values)
    assert bits_equal(scales.reshape(15, 3), flat_scales)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    again_values, again_scales = mx_cast(
        strided, format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode)
    )
    assert bits_equal(again_values, values) and bits_equal(again_scales, scales)


@all_modes
def test_cast_of_float16_is_that_of_float32(mode: CastMode) -> None:
    # float16 lies inside float32, so the widened input is the same number.
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half()
    for actual, expected in zip(
        mx_cast(x, format=BlockFormat.of(scale_mode=mode)),
        mx_cast(x.float(), format=BlockFormat.of(scale_mode=mode)),
        strict=True,
    ):
        assert bits_equal(actual, expected)


@all_modes
def test_cast_takes_the_block_size(mode: CastMode) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = mx_cast(x, format=BlockFormat.of(scale_mode=mode, block_size=16))
    expected, expected_scales = torchao_cast(x, E4M3, mode, 16)
    assert scales.shape == (4, 4)
    assert bits_equal(values, expected) and bits_equal(scales, expected_scales)


def finite_absmaxes() -> Tensor:
    """[N] of float32: all powers of two times the edges of a mantissa, and random bits."""
    mantissas = torch.tensor([0, 1, 2, 0x5FFFFE, 0x5FFFFF, 0x600000, 0x600001, 0x600002, 0x7FFFFF])
    edges = (torch.arange(255)[:, None] << 23) + mantissas
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 0x7F800000, (100_000,), generator=generator)
    return torch.cat([edges.flatten(), random]).to(torch.int32).view(torch.float32)


def assert_smallest_that_fits(exponent: Tensor, absmax: Tensor, elem_dtype: torch.dtype) -> None:
    """absmax <= max * 2^(exponent - 127), and no smaller scale does; float64 holds both exactly."""
    largest = torch.finfo(elem_dtype).max * torch.exp2(exponent.double() - 127)
    assert (absmax.double() <= largest).all()
    assert (absmax.double() > largest / 2)[exponent > 0].all()


@all_elements
def test_rceil_is_the_smallest_scale_that_fits(elem_dtype: torch.dtype) -> None:
    absmax = finite_absmaxes()
    assert_smallest_that_fits(
        e8m0_exponent(absmax, BlockFormat.of(elem_dtype, "rceil")), absmax, elem_dtype
    )


@all_elements
def test_rceil_of_special_values(elem_dtype: torch.dtype) -> None:
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    absmax = torch.cat([torch.tensor([0.0, math.inf]), nans])
    assert e8m0_exponent(absmax, BlockFormat.of(elem_dtype, "rceil")).tolist() == [
        0,
        254,
        255,
        255,
        255,
    ]


@all_elements
def test_rceil_is_the_quotient_rounded_up(elem_dtype: torch.dtype) -> None:
    """As PTX takes it from absmax / max, but for one quotient that float32 rounds to 2^-127."""
    largest = torch.finfo(elem_dtype).max
    absmax = finite_absmaxes()
    different = e8m0_exponent(absmax, BlockFormat.of(elem_dtype, "rceil")) != round_up_to_e8m0(
        absmax / largest
    )
    rounded = torch.tensor(largest * 2.0**-127).nextafter(torch.tensor(1.0))
    assert rounded / largest == 2.0**-127
    assert absmax[different].unique().tolist() == [rounded.item()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@all_elements
def test_log2_is_exact_for_every_absmax_of_16_bits(
    elem_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    absmax = torch.arange(1 << 15).to(torch.int16).view(dtype).float()
    exponent = e8m0_exponent(absmax, BlockFormat.of(elem_dtype, "rceil"))
    assert torch.equal(exponent, e8m0_exponent(absmax, BlockFormat.of(elem_dtype, "rceil-log2")))
    finite = absmax.isfinite()
    assert_smallest_that_fits(exponent[finite], absmax[finite], elem_dtype)


@all_elements
def test_log2_of_float32_rounds_down_to_a_power_of_two(elem_dtype: torch.dtype) -> None:
    # A quotient of 2^k (1 + 2^-23) has a log2 of less than k + 2^-22; float32's next is k + 2^-17.
    powers = torch.tensor([torch.finfo(elem_dtype).max * 2.0**k for k in range(64, 112)])
    above = powers.nextafter(torch.tensor(math.inf))
    exact, log2 = (
        e8m0_exponent(above, BlockFormat.of(elem_dtype, m)) for m in ("rceil", "rceil-log2")
    )
    assert exact.tolist() == [k + 128 for k in range(64, 112)]
    assert log2.tolist() == [k + 127 for k in range(64, 112)]


@all_modes
@all_inputs
@all_edges
def test_e4m3_of_finite_input_is_never_nan(
    case: EdgeCase, dtype: torch.dtype, mode: CastMode
) -> None:
    x = case.x(dtype)
    x = torch.where(x.isfinite(), x, torch.finfo(dtype).max)
    values, scales = mx_cast(x, format=BlockFormat.of(scale_mode=mode))
    assert values.float().isfinite().all() and scales.float().isfinite().all()


@all_modes
@all_inputs
@repeatable
@given(data=st.data())
def test_e4m3_of_random_finite_bits_is_never_nan(
    data: st.DataObject, dtype: torch.dtype, mode: CastMode
) -> None:
    x = data.draw(bit_patterns(dtype, finite=True))
    assert x.isfinite().all()
    values, scales = mx_cast(x, format=BlockFormat.of(scale_mode=mode))
    assert values.float().isfinite().all() and scales.float().isfinite().all()


@all_modes
@all_elements
def test_a_nan_spoils_its_own_block_only(elem_dtype: torch.dtype, mode: CastMode) -> None:
    x = torch.ones(1, 3 * BLOCK_SIZE)
    x[0, BLOCK_SIZE + 1] = math.nan
    values, scales = mx_cast(x, format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode))
    wide = mx_dequantize(values, scales).reshape(3, BLOCK_SIZE)
    assert wide[1].isnan().all()
    assert torch.equal(wide[::2], torch.ones(2, BLOCK_SIZE))


def every_pair(elem_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each of the 256 scales, one a row, over blocks of each of the 256 element bytes."""
    elements = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(elem_dtype)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 256 // BLOCK_SIZE)
    return elements, scales.view(E8M0)


@all_elements
@all_inputs
def test_dequantize_equals_torchao_for_all_bytes(
    dtype: torch.dtype, elem_dtype: torch.dtype
) -> None:
    values, scales = every_pair(elem_dtype)
    actual = mx_dequantize(values, scales, dtype)
    assert actual.dtype == dtype
    expected = torchao_dequantize(values, scales, dtype)
    assert bits_equal(actual, expected), describe_difference(actual, expected)


@all_elements
def test_dequantize_to_float32_rounds_the_true_product_once(elem_dtype: torch.dtype) -> None:
    # In float64 the product of at most 4 significant bits and a power of two is exact.
    values, scales = every_pair(elem_dtype)
    powers = torch.exp2(torch.arange(256).double() - 127)
    powers[255] = math.nan
    expected = (values.double() * powers[:, None]).float()
    assert bits_equal(mx_dequantize(values, scales), expected)


@all_inputs
@all_elements
@all_modes
@all_edges
def test_dequantize_equals_torchao_on_edge_cases(
    case: EdgeCase, mode: CastMode, elem_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    values, scales = mx_cast(
        case.x(dtype), format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode)
    )
    actual = mx_dequantize(values, scales, dtype)
    expected = torchao_dequantize(values, scales, dtype)
    assert bits_equal(actual, expected), describe_difference(actual, expected)


@pytest.mark.parametrize("rows", [32, 64, 128, 160])
def test_dequantize_takes_no_scales_of_the_blocked_layout(rows: int) -> None:
    values, scales = mx_cast(torch.randn(rows, 128))
    laid_out = blocked_scales(scales.view(torch.uint8)).view(E8M0)
    with pytest.raises(ValueError, match="128x4"):
        mx_dequantize(values, laid_out)
    with pytest.raises(ValueError, match="block_size is 32" if rows == 32 else "128x4"):
        mx_dequantize(values, laid_out, block_size=32)


def test_dequantize_of_blocks_of_8_where_the_blocked_layout_has_the_same_shape() -> None:
    x = torch.randn(32, 128)
    values, scales = mx_cast(x, format=BlockFormat.of(block_size=8))
    with pytest.raises(ValueError, match="block_size=8 says"):
        mx_dequantize(values, scales)
    expected = torch.cat(
        [mx_dequantize(*mx_cast(row[None], format=BlockFormat.of(block_size=8))) for row in x]
    )
    assert bits_equal(mx_dequantize(values, scales, block_size=8), expected)


@pytest.mark.parametrize(
    "values, scales", [((4, 64), (3, 2)), ((4, 64), (4, 3)), ((2, 4, 64), (8, 2)), ((4, 64), ())]
)
def test_dequantize_refuses_shapes_that_do_not_belong_together(
    values: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., D / block size\]"):
        mx_dequantize(torch.zeros(values).to(torch.float8_e4m3fn), torch.ones(scales).to(E8M0))


@all_inputs
@all_elements
@all_modes
def test_representable_values_survive(
    mode: CastMode, elem_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    # A block with the absmax 2^max_exponent * 2^k has the scale 2^k in every mode, "ceil" too
    # (no mantissa to round up), so each element of at most that magnitude times 2^k is exact.
    elem = element_of(elem_dtype)
    largest = 2.0**elem.max_exponent
    bytes_ = torch.arange(256, dtype=torch.uint8).view(elem_dtype).double()
    elements = bytes_[bytes_.abs() <= largest]
    padding = -len(elements) % (BLOCK_SIZE - 1)
    blocks = torch.cat([elements, torch.zeros(padding).double()]).reshape(-1, BLOCK_SIZE - 1)
    blocks = torch.cat([blocks, torch.full((len(blocks), 1), largest).double()], dim=-1)
    smallest = torch.finfo(elem_dtype).smallest_normal * torch.finfo(elem_dtype).eps
    # Nothing leaves the normal range of the inputs' dtypes.
    first = -126 - round(math.log2(smallest))
    for k in range(first, 128 - elem.max_exponent):
        x = (blocks * 2.0**k).to(dtype).reshape(1, -1)
        values, scales = mx_cast(x, format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode))
        assert (scales.view(torch.uint8) == k + 127).all()
        assert bits_equal(mx_dequantize(values, scales, dtype), x)


def test_e8m0_table() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(E8M0)
    actual = e8m0_to_float(scales)
    assert actual.dtype == torch.float32
    # Every power from 2^-127 (a subnormal) to 2^127 is a float32 number.
    expected = torch.tensor([2.0 ** (b - 127) for b in range(255)], dtype=torch.float64)
    assert torch.equal(actual[:255].double(), expected)
    assert actual[255].isnan()


@pytest.mark.parametrize("dtype", list(ELEMENT_DTYPES), ids=str)
def test_element_table_agrees_with_torch(dtype: torch.dtype) -> None:
    elem, info = element_of(dtype), torch.finfo(dtype)
    assert elem.dtype == dtype
    assert elem.max == info.max
    assert elem.max_exponent == math.floor(math.log2(info.max))
    assert 2.0**-elem.mantissa_bits == info.eps
    assert (1 + elem.max_mantissa * 2.0**-23) * 2.0**elem.max_exponent == info.max


def test_format_names_itself() -> None:
    assert str(BlockFormat.of()) == "mxfp8 e4m3fn rceil block 32"
    assert str(BlockFormat.of(E5M2, "even", 16)) == "mxfp8 e5m2 even block 16"
    assert block_format("mxfp8") == BlockFormat.of()


@pytest.mark.parametrize("block_size", [1, 16, 32, 100])
@all_elements
@all_modes
def test_a_name_gives_its_format(mode: CastMode, elem_dtype: torch.dtype, block_size: int) -> None:
    fmt = BlockFormat.of(elem_dtype, mode, block_size)
    assert block_format(fmt.name) == block_format(fmt) == fmt


@all_modes
def test_format_without_log2(mode: CastMode) -> None:
    fmt = BlockFormat.of(E5M2, mode, 16)
    assert fmt.without_log2 == (BlockFormat.of(E5M2, "rceil", 16) if mode == "rceil-log2" else fmt)


@pytest.mark.parametrize("bad", [torch.float16, torch.float8_e4m3fnuz, torch.int8], ids=str)
@pytest.mark.parametrize("mode", CAST_MODES)
def test_unknown_element_dtype_is_named(mode: CastMode, bad: torch.dtype) -> None:
    with pytest.raises(ValueError) as error:
        mx_cast(torch.ones(1, 32), format=BlockFormat.of(elem_dtype=bad, scale_mode=mode))
    for part in (str(bad), "torch.float8_e4m3fn", "torch.float8_e5m2", "elem_dtype"):
        assert part in str(error.value)


@pytest.mark.parametrize("bad", ["RCEIL", "nearest", ""])
def test_unknown_scale_mode_is_named(bad: str) -> None:
    with pytest.raises(ValueError) as error:
        mx_cast(torch.ones(1, 32), format=BlockFormat.of(scale_mode=bad))  # type: ignore[arg-type]
    for part in (repr(bad), "scale_mode", *CAST_MODES):
        assert part in str(error.value)


@pytest.mark.parametrize("cast", [mx_cast, lambda x: mxnorm_cast(x, eps=1e-6)])
@pytest.mark.parametrize("shape", [(2, 48), (33,), ()])
def test_width_that_is_no_multiple_of_the_block_is_named(
    cast: Callable[[Tensor], object], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        cast(torch.ones(shape))
    assert str(shape) in str(error.value) and "block_size 32" in str(error.value)
