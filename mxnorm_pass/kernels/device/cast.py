"""Device functions: blocks in a format, and back, as ``numerics.cast`` does it."""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.elements import round_to_element, scaled, to_float8
from mxnorm_pass.kernels.device.mx import e8m0_exponent, e8m0_reciprocal, e8m0_value
from mxnorm_pass.kernels.device.nvfp4 import nvfp4_reciprocal, nvfp4_scale, nvfp4_value
from mxnorm_pass.kernels.device.rounding import narrow, round_to, widen


@triton.jit
def scale_blocks(
    absmax,
    tensor_scale,
    mode: tl.constexpr,
    max_exponent: tl.constexpr,
    mantissa_bits: tl.constexpr,
    max_mantissa: tl.constexpr,
):
    """Scales of blocks whose absmaxes [M, K] have these bits.

    Returns:
        bytes of scales, int32 [M, K]; and factors, float32 [M, K], that the blocks are to be
        multiplied by: 0 or NaN where a scale is NaN.
    """
    if mode == "nearest":
        scale = nvfp4_scale(absmax, tensor_scale)
        return scale, nvfp4_reciprocal(scale, tensor_scale)
    else:
        scale = e8m0_exponent(absmax, mode, max_exponent, mantissa_bits, max_mantissa)
        return scale, e8m0_reciprocal(scale, mode)


@triton.jit
def dequantize(
    y,
    factor,
    scale,
    tensor_scale,
    dtype: tl.constexpr,
    MODE: tl.constexpr,
    ELEM_DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    noise=None,
):
    """Elements of blocks ``y``, times what :func:`scale_blocks` made: ``Quantized.dequantize``.

    Args:
        noise: see ``elements.to_elements``.
    """
    if noise is not None:
        x = widen(y) * tl.expand_dims(factor, 2)
        elements = round_to_element(x, BITS, MANTISSA_BITS, LARGEST, noise)
    elif BITS == 8:
        x = scaled(y, factor, MODE)
        elements = to_float8(x, ELEM_DTYPE, MANTISSA_BITS, LARGEST).to(tl.float32)
    else:
        elements = round_to_element(scaled(y, factor, MODE), BITS, MANTISSA_BITS, LARGEST)
    if MODE == "nearest":
        value = nvfp4_value(scale, tensor_scale)
    else:
        value = round_to(e8m0_value(scale), dtype)
    return narrow(elements * tl.expand_dims(value, 2), dtype)
