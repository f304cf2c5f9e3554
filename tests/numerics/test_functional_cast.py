"""Norm and cast in one, and the linear on casts, against the steps taken one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edge_cases import BLOCK_SIZE, EDGE_CASES, WIDTH, EdgeCase, bits_equal
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    E4M3,
    E5M2,
    EPS,
    U,
    all_edges,
    all_elements,
    all_inputs,
    all_modes,
    assert_bits_equal,
    estimate_error,
    gain,
    inverse_rms64,
    llama_norm,
    normal,
    with_and_without_weight,
)
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

from mxnorm_pass.numerics.cast import mx_cast, mx_dequantize
from mxnorm_pass.numerics.formats import CAST_MODES, SCALE_MODES, BlockFormat, CastMode, ScaleMode
from mxnorm_pass.numerics.linear import mx_linear
from mxnorm_pass.numerics.norm import inverse_rms, mxnorm
from mxnorm_pass.numerics.norm_cast import mxnorm_cast, mxnorm_cast_both
from mxnorm_pass.numerics.rms import Estimator

# (norm_dtype follows the input, norm_dtype is None): HuggingFace's rounding and F.rms_norm's.
ROUNDINGS = {"huggingface": True, "rms_norm": False}


# --- mxnorm_cast ----------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@all_inputs
@all_elements
@all_modes
def test_exact_cast_is_norm_then_cast(
    mode: CastMode,
    elem_dtype: torch.dtype,
    dtype: torch.dtype,
    rounding: str,
    weight_dtype: torch.dtype | None,
) -> None:
    norm: dict[str, Any] = {
        "eps": EPS, "estimator": "exact", "norm_dtype": dtype if ROUNDINGS[rounding] else None
    }  # fmt: skip
    cast: dict[str, Any] = {"format": BlockFormat.of(elem_dtype, mode)}
    for x in [normal(2, 3, WIDTH, dtype=dtype)] + [case.x(dtype) for case in EDGE_CASES]:
        weight = None if weight_dtype is None else gain(x.shape[-1], weight_dtype)
        values, scales, rho = mxnorm_cast(x, weight, **norm, **cast)
        expected_values, expected_scales = mx_cast(mxnorm(x, weight, **norm), **cast)
        assert_bits_equal(values, expected_values)
        assert_bits_equal(scales, expected_scales)
        assert_bits_equal(rho, inverse_rms(x, eps=EPS, estimator="exact"))


@all_modes
def test_exact_cast_equals_llama_norm_then_cast(mode: CastMode) -> None:
    # The bf16 roundings before and after the gain are there: without them bits differ.
    x, weight = normal(32, WIDTH).bfloat16(), gain().bfloat16()
    expected = mx_cast(llama_norm(weight)(x), format=BlockFormat.of(scale_mode=mode))
    options: dict[str, Any] = {
        "eps": EPS,
        "estimator": "exact",
        "format": BlockFormat.of(scale_mode=mode),
    }
    actual = mxnorm_cast(x, weight, norm_dtype=torch.bfloat16, **options)
    assert_bits_equal(actual[0], expected[0])
    assert_bits_equal(actual[1], expected[1])
    unrounded = mxnorm_cast(x, weight, **options)
    assert not bits_equal(unrounded[0], expected[0])


def assert_within_half_an_ulp(
    values: Tensor, scales: Tensor, y: Tensor, relative_error: float, mode: CastMode
) -> None:
    """|v s - y| against what rounding y / s to the element type allows.

    With ``mantissa`` explicit bits the spacing at |u| in [2^e, 2^(e+1)) is 2^(e - mantissa), so
    rounding u = y / s to nearest moves it by at most 2^-(mantissa + 1) |u|, half of the type's
    eps; below the smallest normal the spacing is the smallest subnormal. Multiplied by s:
    eps / 2 |y|, or half of the smallest subnormal times s; for e4m3fn 2^-4 |y| or 2^-10 s.
    Elements above the largest finite one go to it first, which "rceil" and "ceil" rule out: their
    scale is at least absmax / max. y itself comes out of float32 with ``relative_error``.
    """
    info = torch.finfo(values.dtype)
    s = scales.float().double().repeat_interleave(BLOCK_SIZE, dim=-1)
    saturated = (y / s).clamp(-info.max, info.max) * s
    if mode in ("rceil", "ceil"):
        assert (y.abs() <= info.max * s * (1 + relative_error)).all()
    half = torch.maximum(info.eps / 2 * y.abs(), s * info.smallest_normal * info.eps / 2)
    bound = half * (1 + relative_error) + relative_error * y.abs()
    assert ((mx_dequantize(values, scales).double() - saturated).abs() <= bound).all()


@with_and_without_weight
@pytest.mark.parametrize("p", [1, 2, 3.7])
@all_inputs
@all_elements
@all_modes
def test_mxnorm_cast_rounds_only_to_the_element(
    mode: CastMode, elem_dtype: torch.dtype, dtype: torch.dtype, p: float, weighted: bool
) -> None:
    x = normal(64, WIDTH, dtype=dtype)
    x[:16, 40] *= 100
    x[16:32] *= torch.exp2(torch.arange(-12, 4)).to(dtype)[:, None]
    weight = gain(dtype=dtype, low=-1.5) if weighted else None
    values, scales, rho = mxnorm_cast(
        x, weight, eps=EPS, p=p, format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode)
    )
    rho64 = inverse_rms64(x, p, EPS)
    error = estimate_error(p)
    torch.testing.assert_close(rho.double(), rho64, rtol=error, atol=0)
    y = x.double() * rho64
    if weight is not None:
        y = y * weight.double()
    # rho, and the two products x rho w.
    assert_within_half_an_ulp(values, scales, y, error + 2 * U, mode)

    # First rho, then the gain, in float32. Without a gain absmax times rho is the absmax of the
    # products, rounding to nearest being monotone.
    product = x.float() * rho if weight is None else (x.float() * rho) * weight.float()
    y32_values, y32_scales = mx_cast(
        product, format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode)
    )
    assert_bits_equal(scales, y32_scales)
    assert_bits_equal(values, y32_values)


@all_inputs
@pytest.mark.parametrize("p", [1, 2, 3.7])
def test_mxnorm_cast_without_a_gain_is_the_cast_of_mxnorm(p: float, dtype: torch.dtype) -> None:
    x = normal(64, WIDTH, dtype=dtype)
    values, scales, rho = mxnorm_cast(x, eps=EPS, p=p)
    expected = mx_cast(mxnorm(x, eps=EPS, p=p, out_dtype=torch.float32))
    assert_bits_equal(values, expected[0])
    assert_bits_equal(scales, expected[1])
    assert_bits_equal(rho, inverse_rms(x, eps=EPS, p=p))


def test_mxnorm_cast_ignores_the_roundings_of_the_norm() -> None:
    x, weight = normal(8, WIDTH).bfloat16(), gain().bfloat16()
    plain = mxnorm_cast(x, weight, eps=EPS)
    rounded = mxnorm_cast(x, weight, eps=EPS, norm_dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    for a, b in zip(plain, rounded, strict=True):
        assert_bits_equal(a, b)


def assert_same_specials(
    x: Tensor, weight: Tensor | None, p: float, elem_dtype: torch.dtype, mode: CastMode
) -> None:
    cast: dict[str, Any] = {"format": BlockFormat.of(elem_dtype, mode)}
    values, scales, _ = mxnorm_cast(x, weight, eps=EPS, p=p, **cast)
    actual = mx_dequantize(values, scales)
    exact = mxnorm(x, weight, eps=EPS, estimator="exact", norm_dtype=x.dtype)
    expected = mx_dequantize(*mx_cast(exact, **cast))
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("p", [1, 2, 3.7])
@all_inputs
@all_edges
def test_specials_are_those_of_the_exact_norm(case: EdgeCase, dtype: torch.dtype, p: float) -> None:
    x = case.x(dtype)
    shrinking = gain(x.shape[-1], dtype, low=0.25, high=1.0)
    for mode in CAST_MODES:
        for elem_dtype in (E4M3, E5M2):
            assert_same_specials(x, None, p, elem_dtype, mode)
            assert_same_specials(x, shrinking, p, elem_dtype, mode)


@pytest.mark.parametrize("p", [1, 2, 3.7])
@all_inputs
@all_edges
def test_specials_are_those_of_the_exact_norm_with_large_gains(
    case: EdgeCase, dtype: torch.dtype, p: float
) -> None:
    # x * weight may overflow, x rho weight does not: rho comes first.
    x = case.x(dtype)
    growing = gain(x.shape[-1], dtype, low=4.0, high=8.0)
    assert_same_specials(x, growing, p, E4M3, "rceil")


# --- mxnorm_cast_both -----------------------------------------------------------------------


@with_and_without_weight
@pytest.mark.parametrize("p", [1, 2, 3.7])
@all_inputs
@all_elements
@all_modes
def test_cast_along_t_rounds_only_to_the_element(
    mode: CastMode, elem_dtype: torch.dtype, dtype: torch.dtype, p: float, weighted: bool
) -> None:
    x = normal(64, WIDTH, dtype=dtype)
    x[:16, 40] *= 100
    x[16:32] *= torch.exp2(torch.arange(-12, 4)).to(dtype)[:, None]
    weight = gain(low=-1.5) if weighted else None
    *_, values_t, scales_t = mxnorm_cast_both(
        x,
        weight,
        eps=EPS,
        p=p,
        format=BlockFormat.of(elem_dtype=elem_dtype, scale_mode=mode),
        out_dtype=torch.float32,
    )
    assert values_t.is_contiguous() and scales_t.is_contiguous()
    assert values_t.shape == (WIDTH, 64) and scales_t.shape == (WIDTH, 64 // BLOCK_SIZE)
    y = x.double() * inverse_rms64(x, p, EPS)
    if weight is not None:
        y = y * weight.double()
    # rho, and the two products x rho w.
    assert_within_half_an_ulp(values_t, scales_t, y.t(), estimate_error(p) + 2 * U, mode)


@pytest.mark.parametrize("gain_in_rows", [True, False])
@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
@pytest.mark.parametrize("shape", [(64,), (2, 32), (4, 2, 8)], ids=str)
@all_inputs
def test_casts_in_both_directions_are_those_of_one_norm(
    dtype: torch.dtype, shape: tuple[int, ...], estimator: Estimator, gain_in_rows: bool
) -> None:
    x, weight = normal(*shape, WIDTH, dtype=dtype), gain(dtype=dtype)
    options: dict[str, Any] = {"eps": EPS, "estimator": estimator, "norm_dtype": dtype}
    *in_rows, values_t, scales_t = mxnorm_cast_both(x, weight, gain_in_rows=gain_in_rows, **options)
    expected = mxnorm_cast(x, weight if gain_in_rows else None, **options)
    for a, b in zip(in_rows, expected, strict=True):
        assert_bits_equal(a, b)
    y = mxnorm(x, weight, **options).reshape(64, WIDTH)
    for channel in (0, 1, WIDTH - 1):
        values, scales = mx_cast(y[:, channel])
        assert_bits_equal(values_t[channel], values)
        assert_bits_equal(scales_t[channel], scales)


@pytest.mark.parametrize("elem_dtype", [E4M3, E5M2], ids=["e4m3fn", "e5m2"])
@pytest.mark.parametrize("mode", SCALE_MODES)
def test_exact_cast_along_t_is_torchaos_of_llamas_norm(
    mode: ScaleMode, elem_dtype: torch.dtype
) -> None:
    # The bf16 roundings before and after the gain are there: without them bits differ.
    x, weight = normal(64, WIDTH).bfloat16(), gain().bfloat16()
    y = llama_norm(weight)(x)
    scales, values = to_mx(
        y.t().contiguous(), elem_dtype, BLOCK_SIZE, ScaleCalculationMode[mode.upper()]
    )
    options: dict[str, Any] = {
        "eps": EPS, "estimator": "exact", "format": BlockFormat.of(elem_dtype, mode)
    }  # fmt: skip
    *_, values_t, scales_t = mxnorm_cast_both(x, weight, norm_dtype=torch.bfloat16, **options)
    assert_bits_equal(values_t, values)
    assert_bits_equal(scales_t, scales)
    *_, unrounded, _ = mxnorm_cast_both(x, weight, **options)
    assert not bits_equal(unrounded, values)


@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
@all_inputs
@all_edges
def test_specials_stay_in_their_block_along_t(
    case: EdgeCase, dtype: torch.dtype, estimator: Estimator
) -> None:
    special = case.x(dtype).reshape(-1, case.x(dtype).shape[-1])[:1]
    width = special.shape[-1]
    ordinary = normal(63, width, dtype=dtype)
    x = torch.cat([ordinary[:40], special, ordinary[40:]])
    options: dict[str, Any] = {"eps": EPS, "estimator": estimator}
    *_, values_t, scales_t = mxnorm_cast_both(x, gain(width, dtype), **options)
    y = mxnorm(special, gain(width, dtype), **options)[0]
    got = mx_dequantize(values_t, scales_t)
    *_, expected, _ = mxnorm_cast_both(ordinary[:32], gain(width, dtype), **options)
    assert_bits_equal(values_t[:, :32], expected)
    assert torch.equal(got[:, 40].isnan(), y.isnan())
    assert torch.equal(got[:, 32:].isnan().any(-1), y.isnan())


def test_rows_that_make_no_whole_blocks_have_no_cast_along_t() -> None:
    with pytest.raises(ValueError, match="not divisible by block_size 32"):
        mxnorm_cast_both(normal(48, WIDTH), eps=EPS)


# --- mx_linear ------------------------------------------------------------------------------


@with_and_without_weight
@all_inputs
@all_elements
@all_modes
def test_linear_is_linear_on_dequantised_operands(
    mode: CastMode, elem_dtype: torch.dtype, dtype: torch.dtype, weighted: bool
) -> None:
    options: dict[str, Any] = {"format": BlockFormat.of(elem_dtype, mode)}
    x, weight = normal(2, 5, WIDTH, dtype=dtype), normal(24, WIDTH, seed=1, dtype=dtype)
    bias = normal(24, seed=2, dtype=dtype) if weighted else None
    w = mx_dequantize(*mx_cast(weight, **options), dtype)
    expected = F.linear(mx_dequantize(*mx_cast(x, **options), dtype), w, bias)
    assert_bits_equal(mx_linear(x, weight, bias, **options), expected)

    values, scales, _ = mxnorm_cast(x, eps=EPS, **options)
    expected = F.linear(mx_dequantize(values, scales, dtype), w, bias)
    actual = mx_linear(x, weight, bias, quantized=(values, scales), **options)
    assert_bits_equal(actual, expected)


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16], ids=["g32", "g16"])
@all_inputs
@all_modes
def test_linear_folds_the_gain_in_float32(
    mode: CastMode, dtype: torch.dtype, gain_dtype: torch.dtype
) -> None:
    x, weight = normal(5, WIDTH, dtype=dtype), normal(24, WIDTH, seed=1, dtype=dtype)
    scale = gain(dtype=gain_dtype)
    values, scales, rho = mxnorm_cast(x, eps=EPS, format=BlockFormat.of(scale_mode=mode))
    folded = mx_cast(weight.float() * scale.float(), format=BlockFormat.of(scale_mode=mode))
    expected = F.linear(mx_dequantize(values, scales, dtype), mx_dequantize(*folded, dtype))
    y = mxnorm(x, scale, eps=EPS)
    actual = mx_linear(
        y, weight, quantized=(values, scales), gain=scale, format=BlockFormat.of(scale_mode=mode)
    )
    assert_bits_equal(actual, expected)


@with_and_without_weight
@pytest.mark.parametrize("fold", [False, True])
@all_inputs
def test_linear_gradients_are_straight_through(
    dtype: torch.dtype, fold: bool, weighted: bool
) -> None:
    x = normal(2, 5, WIDTH, dtype=dtype).requires_grad_()
    weight = normal(24, WIDTH, seed=1, dtype=dtype).requires_grad_()
    bias = normal(24, seed=2, dtype=dtype).requires_grad_() if weighted else None
    grad = normal(2, 5, 24, seed=3, dtype=dtype)
    leaves = [x, weight] if bias is None else [x, weight, bias]
    scale = gain(dtype=dtype) if fold else None
    actual = torch.autograd.grad(mx_linear(x, weight, bias, gain=scale), leaves, grad)
    expected = torch.autograd.grad(F.linear(x, weight, bias), leaves, grad)
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_gradient_reaches_through_norm_and_linear() -> None:
    # What the rewritten graph computes: casts forward, the high-precision chain backward.
    x = normal(6, WIDTH).requires_grad_()
    scale, weight = gain().requires_grad_(), normal(24, WIDTH, seed=1).requires_grad_()
    grad = normal(6, 24, seed=2)
    y = mxnorm(x, scale, eps=EPS)
    quantized = mxnorm_cast(x, scale, eps=EPS)[:2]
    actual = torch.autograd.grad(
        mx_linear(y, weight, quantized=quantized), [x, scale, weight], grad
    )
    expected = torch.autograd.grad(
        F.linear(mxnorm(x, scale, eps=EPS), weight), [x, scale, weight], grad
    )
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


# --- equivariance ---------------------------------------------------------------------------


@settings(max_examples=examples(60), derandomize=True, deadline=None)
@given(
    k=st.integers(-30, 30),
    p=st.sampled_from([0.5, 1, 2, 3.7]),
    estimator=st.sampled_from(["mxnorm", "exact"]),
    mode=st.sampled_from(CAST_MODES),
    seed=st.integers(0, 2**16),
)
def test_scaling_by_a_power_of_two_changes_no_bit(
    k: int, p: float, estimator: Estimator, mode: CastMode, seed: int
) -> None:
    # Multiplying by 2^k commutes with every rounding while nothing leaves the normal range: with
    # 2^-30 <= |x| <= 2^4 or x = 0, the squares stay between 2^-120 and 2^68.
    x = normal(3, WIDTH, seed=seed)
    x = torch.where(x.abs() < 2.0**-30, 0.0, x)
    assert x.abs().max() < 16
    options: dict[str, Any] = {"eps": 0.0, "p": p, "estimator": estimator}
    assert_bits_equal(mxnorm(x * 2.0**k, **options), mxnorm(x, **options))
    scaled = mxnorm_cast(x * 2.0**k, format=BlockFormat.of(scale_mode=mode), **options)
    plain = mxnorm_cast(x, format=BlockFormat.of(scale_mode=mode), **options)
    assert_bits_equal(scaled[0], plain[0])
    assert_bits_equal(scaled[1], plain[1])
    assert_bits_equal(scaled[2] * 2.0**k, plain[2])
