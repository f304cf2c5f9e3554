"""Device functions: NVFP4's scales, what ``numerics.nvfp4`` computes."""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.elements import to_float8
from mxnorm_pass.kernels.device.rounding import INTERPRETED


@triton.jit
def nvfp4_scale(absmax, tensor_scale):
    """Bytes of e4m3, int32, of the scales of blocks whose absmax has the bits ``absmax``.

    Args:
        tensor_scale: float32, or None.
    """
    scale = tl.div_rn(absmax.to(tl.float32, bitcast=True), 6.0)
    if tensor_scale is not None:
        scale = tl.div_rn(scale, tensor_scale)
    # At least the smallest normal number; NaN is not less.
    scale = to_float8(tl.where(scale < 2.0**-6, 2.0**-6, scale), tl.float8e4nv, 3, 448.0)
    return scale.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def nvfp4_reciprocal(scale, tensor_scale):
    """What elements are multiplied by, float32, for bytes that :func:`nvfp4_scale` returned."""
    inverse = 1.0
    if tensor_scale is not None:
        inverse = tl.div_rn(1.0, tensor_scale)
    return tl.div_rn(inverse, e4m3_value(scale))


@triton.jit
def nvfp4_value(scale, tensor_scale):
    """The scales that belong to the bytes, times the tensor's, float32."""
    value = e4m3_value(scale)
    return value if tensor_scale is None else tensor_scale * value


@triton.jit
def e4m3_value(scale):
    value = scale.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    if INTERPRETED:
        # To the interpreter all patterns are numbers.
        value = tl.where(scale == 0x7F, float("nan"), value)
    return value
