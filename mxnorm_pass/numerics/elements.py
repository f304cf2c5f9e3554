"""Elements of formats: rounding to them, and their values.

Of float8 torch's conversions are right; those of 6 and 4 bits are spelled out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxnorm_pass.numerics.formats import F32_MANTISSA_BITS, ElementFormat
from mxnorm_pass.numerics.stochastic import round_stochastically

_F32_BIAS = 127
_HALF_BYTE = 4
# In e4m3fn and in e5m2.
_NAN = 0x7F


def round_to_elements(x: Tensor, element: ElementFormat, numbers: Tensor | None = None) -> Tensor:
    """Round [..., D] to nearest, ties to even, or stochastically; finite values saturate.

    Args:
        x: float32.
        numbers: random, of x's shape, see :func:`round_stochastically`; None for nearest.

    Returns:
        Of the element's dtype, [..., D], or [..., D / 2] where two share a byte. NaN stays NaN in
        float8; elements of 6 and 4 bits have none, and take 0.
    """
    # Clamp first: float32 -> float8_e4m3fn overflows to NaN on CPU before torch 2.13.
    clamped = x.clamp(-element.max, element.max)
    if element.bits == 8 and numbers is None:
        return clamped.to(element.dtype)
    codes = _encode(clamped, element, numbers)
    if element.bits == 8:
        return torch.where(torch.isnan(x), _NAN, codes).view(element.dtype)
    return codes if element.per_byte == 1 else _pack(codes)


def element_values(values: Tensor, element: ElementFormat, dtype: torch.dtype) -> Tensor:
    """What :func:`round_to_elements` has made, [..., D] in ``dtype``."""
    if element.bits == 8:
        return values.to(dtype)
    return _decode(values if element.per_byte == 1 else _unpack(values), element).to(dtype)


def _encode(x: Tensor, element: ElementFormat, numbers: Tensor | None) -> Tensor:
    """uint8 codes of float32 that is in the element's range, or NaN."""
    # Not by its magnitude alone: which sign a NaN has depends on the hardware.
    x = x.nan_to_num(0.0)
    magnitude = x.abs()
    exponent = (magnitude.view(torch.int32) >> F32_MANTISSA_BITS) - _F32_BIAS
    exponent = exponent.clamp(min=element.min_exponent)
    # In units of the last place, of subnormals the same as of the smallest normal values.
    units = magnitude * _power_of_two(element.mantissa_bits - exponent)
    units = torch.round(units) if numbers is None else round_stochastically(units, numbers)
    # A mantissa that was rounded up to 2 carries over into the exponent's bits.
    code = ((exponent - element.min_exponent) << element.mantissa_bits) + units.to(torch.int32)
    sign = torch.signbit(x).to(torch.int32) << (element.bits - 1)
    return (code | sign).to(torch.uint8)


def _decode(codes: Tensor, element: ElementFormat) -> Tensor:
    bits = codes.to(torch.int32)
    field = (bits & ((1 << (element.bits - 1)) - 1)) >> element.mantissa_bits
    mantissa = bits & ((1 << element.mantissa_bits) - 1)
    units = mantissa + ((field > 0).to(torch.int32) << element.mantissa_bits)
    exponent = field.clamp(min=1) - 1 + element.min_exponent - element.mantissa_bits
    magnitude = units.to(torch.float32) * _power_of_two(exponent)
    negative = bits >> (element.bits - 1) > 0
    return torch.where(negative, -magnitude, magnitude)


def _power_of_two(exponent: Tensor) -> Tensor:
    # From its bits: exact on every backend, unlike exp2.
    return ((exponent + _F32_BIAS) << F32_MANTISSA_BITS).view(torch.float32)


def _pack(codes: Tensor) -> Tensor:
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    packed: Tensor = first | (second << _HALF_BYTE)
    return packed


def _unpack(packed: Tensor) -> Tensor:
    halves = (packed & ((1 << _HALF_BYTE) - 1), packed >> _HALF_BYTE)
    return torch.stack(halves, -1).flatten(-2)
