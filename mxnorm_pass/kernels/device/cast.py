"""Device functions: blocks in a format, and back, as ``numerics.cast`` does it."""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.elements import round_to_element, to_float8
from mxnorm_pass.kernels.device.mx import e8m0_exponent, e8m0_reciprocal, e8m0_value
from mxnorm_pass.kernels.device.nvfp4 import nvfp4_reciprocal, nvfp4_scale, nvfp4_value
from mxnorm_pass.kernels.device.rounding import INTERPRETED, narrow, round_to, widen


@triton.jit
def scale_blocks(
    y,
    absmax,
    tensor_scale,
    mode: tl.constexpr,
    max_exponent: tl.constexpr,
    mantissa_bits: tl.constexpr,
    max_mantissa: tl.constexpr,
):
    """Divide blocks ``y`` [M, K, B] by the scales that the bits of their absmaxes [M, K] give.

    Returns:
        float32, to be rounded to elements; bytes of scales, int32 [M, K]; and factors [M, K] that
        the blocks were multiplied by: 0 or NaN where a block's scale is NaN.
    """
    if mode == "nearest":
        scale = nvfp4_scale(absmax, tensor_scale)
        factor = nvfp4_reciprocal(scale, tensor_scale)
    else:
        scale = e8m0_exponent(absmax, mode, max_exponent, mantissa_bits, max_mantissa)
        factor = e8m0_reciprocal(scale, mode)
    of_blocks = tl.expand_dims(factor, 2)
    if y.dtype == tl.bfloat16 and mode != "nearest" and not INTERPRETED:
        # Two at once. The factor is a power of two, 0 or NaN: a product is exact, or subnormal,
        # which no element is near.
        return widen(y * of_blocks.to(tl.bfloat16)), scale, factor
    return widen(y) * of_blocks, scale, factor


@triton.jit
def dequantize(
    scaled,
    scale,
    tensor_scale,
    dtype: tl.constexpr,
    MODE: tl.constexpr,
    ELEM_DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Elements of what :func:`scale_blocks` returned, times scales: ``Quantized.dequantize``."""
    if BITS == 8:
        elements = to_float8(scaled, ELEM_DTYPE, MANTISSA_BITS, LARGEST).to(tl.float32)
    else:
        elements = round_to_element(scaled, BITS, MANTISSA_BITS, LARGEST)
    if MODE == "nearest":
        value = nvfp4_value(scale, tensor_scale)
    else:
        value = round_to(e8m0_value(scale), dtype)
    return narrow(elements * tl.expand_dims(value, 2), dtype)
