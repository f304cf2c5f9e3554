"""Device functions: NVFP4's scales, what ``numerics.nvfp4`` computes."""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.elements import to_float8
from mxnorm_pass.kernels.device.rounding import INTERPRETED

SIXTH = tl.constexpr(0.1666666716337204)


@triton.jit
def nvfp4_scale(absmax, tensor_scale):
    """Bytes of e4m3, int32, of the scales of blocks whose absmax has the bits ``absmax``.

    Args:
        tensor_scale: float32, or None.
    """
    scale = nvfp4_quotient(absmax.to(tl.float32, bitcast=True), tensor_scale)
    # At least the smallest normal number; NaN is not less.
    scale = to_float8(tl.where(scale < 2.0**-6, 2.0**-6, scale), tl.float8e4nv, 3, 448.0)
    return scale.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def nvfp4_quotient(absmax, tensor_scale):
    """``absmax / 6 / tensor_scale``, float32, rounded twice."""
    scale = divide(absmax, 6.0, SIXTH, absmax * SIXTH)
    if tensor_scale is not None:
        inverse = tl.div_rn(1.0, tensor_scale)
        guess = divide(scale, tensor_scale, inverse, scale * inverse)
        scale = divide(scale, tensor_scale, inverse, guess)
    return scale


@triton.jit
def nvfp4_reciprocal(scale, tensor_scale):
    """What elements are multiplied by, float32, for bytes that :func:`nvfp4_scale` returned."""
    value = e4m3_value(scale)
    inverse = 1.0
    if tensor_scale is not None:
        inverse = tl.div_rn(1.0, tensor_scale)
    guess = about_one_by(value)
    return divide(inverse, value, guess, inverse * guess)


@triton.jit
def divide(x, divisor, inverse, guess):
    """``x / divisor``, rounded to nearest, from a guess a few units in the last place off.

    One step of Newton's, whose remainder float32 holds exactly. It is right from any such guess
    where the divisor has few bits, and otherwise from one that such a step has made, if the
    inverse is the nearest (Markstein 1990). The hardware's division is the same behind a branch,
    which keeps those of several blocks from overlapping.
    """
    if INTERPRETED:
        return tl.div_rn(x, divisor)
    else:
        better = tl.fma(tl.fma(-guess, divisor, x), inverse, guess)
        # Infinity less infinity is no number.
        return tl.where(tl.abs(guess) < float("inf"), better, guess)


@triton.jit
def about_one_by(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


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
