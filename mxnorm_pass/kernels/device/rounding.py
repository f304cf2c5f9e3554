"""Device functions: conversions between float32 and narrow floats, rounded to nearest even.

The hardware converts so by itself. Triton's interpreter truncates to bfloat16 and takes bfloat16's
subnormals for normal numbers; there bits do the same by hand.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x):
    """``x``, float32, bfloat16 or float16, in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.bfloat16:
        # Compilers take three instructions for a register's two numbers.
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=&r,=&r,r",
            [x],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x``, float32, as ``dtype``: float32, bfloat16 or float16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def convert(x, dtype: tl.constexpr):
    """``x``, float32, bfloat16 or float16, as another of these, rounded once."""
    return x if x.dtype == dtype else narrow(widen(x), dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """``x``, float32, rounded to ``dtype``, in float32."""
    return widen(narrow(x, dtype))


@triton.jit
def multiply(a, b, dtype: tl.constexpr):
    """``a`` times ``b``, rounded once, as ``dtype``, the wider of theirs."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16 and not INTERPRETED:
        # float32 holds the product exactly: the same, two at once.
        return a * b
    return narrow(widen(a) * widen(b), dtype)


@triton.jit
def add_toward_zero(a, b):
    """``a + b``, float32 and not negative, rounded down."""
    if INTERPRETED:
        total = a.to(tl.float64) + b.to(tl.float64)
        near = total.to(tl.float32)
        below = (near.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        return tl.where(near.to(tl.float64) > total, below, near)
    else:
        return tl.inline_asm_elementwise(
            "add.rz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
