"""NVFP4 casts against torchao's, bit for bit, and against float64."""

from __future__ import annotations

import pytest
import torch
from edge_cases import EDGE_CASES, EdgeCase, bits_equal, describe_difference
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from mxnorm_pass import functional, ops

SMALLEST, LARGEST = 2.0**-6, 448.0
INPUTS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SCALED = pytest.mark.parametrize("scaled", [False, True], ids=["blocks", "blocks and tensor"])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_equals_torchao(x: Tensor, tensor_scale: Tensor | None) -> None:
    values, scales = functional.mx_cast(x, "nvfp4", tensor_scale=tensor_scale)
    want_scales, want = nvfp4_quantize(x, per_tensor_scale=tensor_scale)
    want_scales = want_scales.reshape(scales.shape)
    assert bits_equal(scales, want_scales), describe_difference(scales, want_scales)
    back = functional.mx_dequantize(values, scales, format="nvfp4", tensor_scale=tensor_scale)
    elements = f4_unpacked_to_f32(unpack_uint4(want)).unflatten(-1, (-1, 16))
    outer = 1.0 if tensor_scale is None else tensor_scale
    want_back = (elements * (outer * want_scales.float()).unsqueeze(-1)).flatten(-2)
    # What elements are in a block whose scale is NaN means nothing.
    assert bits_equal(back, want_back), describe_difference(back, want_back)
    codes, want_codes = unpack_uint4(values), unpack_uint4(want)
    known = ~torch.isnan(back) & ~torch.isnan(x)
    assert torch.equal(codes[known], want_codes[known])


@SCALED
@INPUTS
@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_cast_equals_torchao(case: EdgeCase, dtype: torch.dtype, scaled: bool) -> None:
    x = case.x(dtype)
    assert_equals_torchao(x, functional.nvfp4_tensor_scale(x) if scaled else None)


@settings(max_examples=examples(100), deadline=None, derandomize=True)
@given(
    data=st.binary(min_size=256, max_size=256),
    exponent=st.integers(-100, 100),
    scaled=st.booleans(),
)
def test_cast_of_random_bits_equals_torchao(data: bytes, exponent: int, scaled: bool) -> None:
    bits = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(2, 32).nan_to_num(1.0)
    # Of random exponents one of 16 is nearly always so large that the others vanish.
    x = torch.frexp(bits).mantissa * 2.0**exponent * 2.0 ** -torch.arange(32).remainder(7)
    assert_equals_torchao(x, functional.nvfp4_tensor_scale(x) if scaled else None)


def test_the_tensors_scale_is_torchaos() -> None:
    x = normal(4, 64)
    assert torch.equal(functional.nvfp4_tensor_scale(x), per_tensor_amax_to_scale(x.abs().amax()))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38])
def test_a_tensor_of_nearly_nothing_gives_no_nan(value: float) -> None:
    x = torch.full((2, 32), value)
    scale = functional.nvfp4_tensor_scale(x)
    values, scales = functional.mx_cast(x, "nvfp4", tensor_scale=scale)
    back = functional.mx_dequantize(values, scales, format="nvfp4", tensor_scale=scale)
    assert torch.isfinite(back).all() and (back - x).abs().max() <= value


@SCALED
def test_error_is_half_a_unit_of_the_element(scaled: bool) -> None:
    """Against float64, where scales are in e4m3's normal range.

    Rounding a block's scale to e4m3 moves it by at most 2^-4 of itself. So elements are off by at
    most half of the largest step, 2 of 6 before that, and what exceeds 6 saturates.
    """
    x = normal(64, 256) * torch.logspace(-1, 1, 64)[:, None]
    tensor_scale = functional.nvfp4_tensor_scale(x) if scaled else None
    values, scales = functional.mx_cast(x, "nvfp4", tensor_scale=tensor_scale)
    assert scales.float().ge(SMALLEST).all() and scales.float().le(LARGEST).all()
    in_range = scales.float() > SMALLEST
    assert in_range.float().mean() > 0.95
    back = functional.mx_dequantize(
        values, scales, torch.float64, format="nvfp4", tensor_scale=tensor_scale
    )
    error = (back - x.double()).abs().unflatten(-1, (-1, 16)).amax(-1)
    absmax = x.double().abs().unflatten(-1, (-1, 16)).amax(-1)
    assert (error <= absmax * (1 + 2**-4) / 6).logical_or(~in_range).all()


def test_wrong_tensor_scales() -> None:
    x = normal(2, 32)
    with pytest.raises(ValueError, match="belongs to NVFP4; the format is 'mxfp8 e4m3fn"):
        functional.mx_cast(x, tensor_scale=torch.tensor(1.0))
    for wrong in (torch.ones(1), torch.tensor(1.0, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="it must be one float32 number"):
            functional.mx_cast(x, "nvfp4", tensor_scale=wrong)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan"), 1e39])
def test_bounds_that_give_no_scale(bound: float) -> None:
    with pytest.raises(ValueError, match="nvfp4_tensor_scale of the normalised tensor"):
        functional.nvfp4_norm_tensor_scale(bound)


def test_block_weights_that_bound_nothing() -> None:
    with pytest.raises(ValueError, match="none may be negative"):
        functional.bound_of_normalized("mxnorm", 2.0, 32, 16, torch.tensor([0.1, -0.1]))
    with pytest.raises(ValueError, match=r"it must be \[2\]"):
        functional.bound_of_normalized("mxnorm", 2.0, 32, 16, torch.tensor([0.1]))


@pytest.mark.parametrize(
    "name", ["nvfp4 e2m1 rceil block 16", "mxfp4 e2m1 nearest block 32", "nvfp4 e4m3fn", "mxfp5"]
)
def test_formats_that_are_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="'nvfp4 e2m1'"):
        functional.block_format(name)


def test_two_elements_of_a_byte_are_of_one_block() -> None:
    with pytest.raises(ValueError, match="even"):
        functional.block_format("mxfp4 e2m1 rceil block 5")
    with pytest.raises(ValueError, match="16"):
        functional.mx_cast(normal(2, 24), "nvfp4")


def test_bytes_need_the_name_of_their_format() -> None:
    values, scales = functional.mx_cast(normal(2, 32), "mxfp6")
    with pytest.raises(ValueError, match="give format="):
        functional.mx_dequantize(values, scales)
    with pytest.raises(TypeError, match="the format 'nvfp4 e2m1 nearest block 16' has"):
        functional.mx_dequantize(values, scales, format="nvfp4")


@pytest.mark.parametrize("format", ["mxfp6", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
def test_norm_and_cast_in_one(format: str, estimator: str) -> None:
    """Exactly the cast of the norm; the estimate that of x times its own rho."""
    x, gain = normal(8, 64).bfloat16(), (1 + 0.1 * normal(64)).bfloat16()
    options = {"eps": 1e-5, "estimator": estimator}
    fmt = functional.block_format(format)
    values, scales, rho = functional.mxnorm_cast(x, gain, format=format, **options)
    y = x.float() * rho * gain.float()
    if estimator == "exact":
        y = ((x.float() * rho) * gain.float()).bfloat16()
    want, want_scales = functional.mx_cast(y, fmt)
    assert bits_equal(scales, want_scales)
    assert torch.equal(values, want)
    name = fmt.name
    spec = (1e-5, estimator, 2.0, name, torch.float32, torch.bfloat16, "row-major")
    results = ops.norm_cast(x, gain, None, None, *spec)
    assert torch.equal(results[0], values)
    torch.library.opcheck(
        ops.norm_cast,
        (x, gain, None, None, *spec),
        test_utils=("test_autograd_registration", "test_faketensor"),
    )
