"""E8M0 scales: how a block's absmax becomes a shared power of two (OCP MX specification v1.0).

The scale modes and special values follow torchao 0.18 (prototype/mx_formats/mx_tensor.py, to_mx)
bit for bit, so that a cast written there can be replaced by the one written here. Its RCEIL, which
takes float32's log2, is "rceil-log2"; "rceil" is what that approximates. Of bfloat16 and float16
both give the same bits.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from mxnorm_pass.numerics.formats import F32_MANTISSA_BITS, F32_MANTISSA_MASK, BlockFormat

E8M0_BIAS: Final = 127
E8M0_LARGEST: Final = 254
E8M0_NAN: Final = 255


def e8m0_exponent(absmax: Tensor, fmt: BlockFormat) -> Tensor:
    """Biased E8M0 exponent of each block's shared scale.

    Args:
        absmax: float32, non-negative or NaN, any shape.
        fmt: its scale mode is "floor" (OCP MX v1.0 section 6.3), "ceil", "even" (absmax rounded
            to the element's mantissa first), "rceil" (cuBLAS block scaling: the smallest power of
            two that is not below absmax / max, exactly), or "rceil-log2" (torchao's emulation of
            it: float32's log2 may round a quotient just above a power of two down to it).

    Returns:
        uint8 of ``absmax``'s shape; 255 encodes NaN.
    """
    elem, scale_mode = fmt.element, fmt.scale_mode
    if scale_mode == "rceil-log2":
        return _log2_exponent(absmax / elem.max)
    bits = absmax.view(torch.int32)
    if scale_mode == "even":
        half_ulp = 1 << (F32_MANTISSA_BITS - elem.mantissa_bits - 1)
        bits = (bits + half_ulp) & (0x1FF << F32_MANTISSA_BITS)
    exponent = ((bits >> F32_MANTISSA_BITS) & 0xFF) - elem.max_exponent
    if scale_mode in ("ceil", "rceil"):
        # Compared with 2**max_exponent or with max, both times a power of two.
        limit = elem.max_mantissa if scale_mode == "rceil" else 0
        exponent = exponent + ((bits & F32_MANTISSA_MASK) > limit).to(torch.int32)
    biased = exponent.clamp(min=0).to(torch.uint8)
    if scale_mode == "rceil":
        biased = torch.where(torch.isinf(absmax), E8M0_LARGEST, biased)
    return torch.where(torch.isnan(absmax), E8M0_NAN, biased)


def _log2_exponent(descale: Tensor) -> Tensor:
    finite = torch.ceil(torch.log2(descale)).clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS
    special = torch.where(torch.isinf(descale), E8M0_LARGEST, finite.to(torch.uint8))
    return torch.where(torch.isnan(descale), E8M0_NAN, special)


def round_up_to_e8m0(x: Tensor) -> Tensor:
    """Biased exponent of the smallest E8M0 number that is not below ``x``; 254 at most.

    Args:
        x: float32, non-negative or NaN, any shape.

    Returns:
        uint8 of ``x``'s shape; 255 encodes NaN.
    """
    bits = x.view(torch.int32)
    exponent = (bits >> F32_MANTISSA_BITS) & 0xFF
    # Below 2**-126 float32 has no exponent; the smallest E8M0 number, 2**-127, is 1 << 22.
    above = torch.where(exponent == 0, bits > (1 << 22), (bits & F32_MANTISSA_MASK) > 0)
    rounded = (exponent + above.to(torch.int32)).clamp(max=E8M0_LARGEST).to(torch.uint8)
    return torch.where(torch.isnan(x), E8M0_NAN, rounded)


def rceil_reciprocal(exponent: Tensor) -> Tensor:
    # 2**(127 - exponent), built from its bits: exact on every backend, unlike exp2.
    reciprocal = ((254 - exponent.to(torch.int32)) << F32_MANTISSA_BITS).view(torch.float32)
    reciprocal = torch.where(exponent == 0, 1.0, reciprocal)
    reciprocal = torch.where(exponent == E8M0_LARGEST, 2.0**-127, reciprocal)
    return torch.where(exponent == E8M0_NAN, float("nan"), reciprocal)


def e8m0_to_float(scales: Tensor) -> Tensor:
    """Value of E8M0 scales: 2**(byte - 127) in float32, NaN for 255 (OCP MX section 5.4.1).

    Args:
        scales: ``torch.float8_e8m0fnu`` of any shape.
    """
    exponent = scales.view(torch.uint8).to(torch.int32)
    # 2**-127 is subnormal in float32 and has no exponent bits: its pattern is 1 << 22.
    bits = torch.where(exponent == 0, 1 << 22, exponent << F32_MANTISSA_BITS)
    return torch.where(exponent == E8M0_NAN, float("nan"), bits.view(torch.float32))
