"""Block formats: how a block's absmax becomes a shared E8M0 scale, and elements are cast under it.

The formats are those of the OCP Microscaling (MX) specification v1.0. The scale modes, special
values and saturation follow torchao 0.18 (``torchao/prototype/mx_formats/mx_tensor.py::to_mx``)
bit for bit, so that a cast written there can be replaced by the one written here. Its RCEIL, which
takes float32's log2, is "rceil-log2"; "rceil" is what that approximates. Of bfloat16 and float16
both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ScaleMode = Literal["rceil", "floor", "ceil", "even"]
CastMode = Literal[ScaleMode, "rceil-log2"]
ScaleLayout = Literal["row-major", "blocked"]
SCALE_MODES: Final[tuple[ScaleMode, ...]] = get_args(ScaleMode)
CAST_MODES: Final[tuple[CastMode, ...]] = get_args(CastMode)

MX_BLOCK_SIZE: Final = 32
E8M0_BIAS: Final = 127
E8M0_LARGEST: Final = 254
E8M0_NAN: Final = 255
F32_MANTISSA_BITS: Final = 23
F32_MANTISSA_MASK: Final = (1 << F32_MANTISSA_BITS) - 1
F32_SMALLEST_NORMAL: Final = 2.0**-126


@dataclass(frozen=True)
class ElementFormat:
    """The element type of an MX format (OCP MX specification, section 5.3).

    Attributes:
        dtype: torch's name for it.
        max: largest finite value.
        max_exponent: exponent of the largest finite value, floor(log2(max)).
        mantissa_bits: explicit mantissa bits.
    """

    dtype: torch.dtype
    max: float
    max_exponent: int
    mantissa_bits: int

    @property
    def max_mantissa(self) -> int:
        """Mantissa bits of ``max`` as float32; 0x600000 where ``max`` is 1.75 * 2**max_exponent."""
        return round((self.max / 2.0**self.max_exponent - 1) * 2**F32_MANTISSA_BITS)


ELEMENT_FORMATS: Final = {
    torch.float8_e4m3fn: ElementFormat(torch.float8_e4m3fn, 448.0, 8, 3),
    torch.float8_e5m2: ElementFormat(torch.float8_e5m2, 57344.0, 15, 2),
}


@dataclass(frozen=True)
class MXFormat:
    """A block format with its scale mode: everything that names one MX cast.

    Attributes:
        elem_dtype: element type, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale_mode: "rceil", "floor", "ceil", "even" or "rceil-log2", see :func:`e8m0_exponent`.
        block_size: elements that share one scale; 32 in MXFP8.
    """

    elem_dtype: torch.dtype = torch.float8_e4m3fn
    scale_mode: CastMode = "rceil"
    block_size: int = MX_BLOCK_SIZE

    @property
    def without_log2(self) -> MXFormat:
        """The same format with "rceil" in the place of "rceil-log2"."""
        return replace(self, scale_mode="rceil") if self.scale_mode == "rceil-log2" else self

    def __str__(self) -> str:
        elem = str(self.elem_dtype).removeprefix("torch.float8_")
        return f"mxfp8 {elem} {self.scale_mode} block {self.block_size}"


def element_format(dtype: torch.dtype) -> ElementFormat:
    """The element format of ``dtype``; a ValueError names the dtypes that are allowed."""
    if dtype not in ELEMENT_FORMATS:
        allowed = ", ".join(str(d) for d in ELEMENT_FORMATS)
        raise ValueError(f"elem_dtype is {dtype}; allowed: {allowed}")
    return ELEMENT_FORMATS[dtype]


def e8m0_exponent(absmax: Tensor, elem_dtype: torch.dtype, scale_mode: CastMode) -> Tensor:
    """Biased E8M0 exponent of each block's shared scale.

    Args:
        absmax: float32, non-negative or NaN, any shape.
        elem_dtype: element type that the scale must fit.
        scale_mode: "floor" (OCP MX v1.0 section 6.3), "ceil", "even" (absmax rounded to the
            element's mantissa first), "rceil" (cuBLAS block scaling: the smallest power of two
            that is not below absmax / max, exactly), or "rceil-log2" (torchao's emulation of it:
            float32's log2 may round a quotient just above a power of two down to it).

    Returns:
        uint8 of ``absmax``'s shape; 255 encodes NaN.

    Raises:
        ValueError: ``elem_dtype`` or ``scale_mode`` is unknown.
    """
    elem = element_format(elem_dtype)
    if scale_mode not in CAST_MODES:
        raise ValueError(f"scale_mode is {scale_mode!r}; allowed: {', '.join(CAST_MODES)}")
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


def cast_elements(
    x: Tensor, exponent: Tensor, elem_dtype: torch.dtype, scale_mode: CastMode
) -> Tensor:
    """Divide by the shared scale, saturate, and round to the element type.

    Args:
        x: float32, blocks along the last dimension.
        exponent: uint8 biased E8M0 exponents, broadcastable to ``x``.
        elem_dtype: target element type.
        scale_mode: the mode that made ``exponent`` (it decides how the smallest and largest
            scales, which float32 cannot divide by exactly, are treated).

    Returns:
        ``elem_dtype`` tensor of ``x``'s shape. Finite values saturate; NaN stays NaN.
    """
    limit = element_format(elem_dtype).max
    if scale_mode in ("rceil", "rceil-log2"):
        scaled = x * _rceil_reciprocal(exponent)
    else:
        scale = (exponent.to(torch.int32) << F32_MANTISSA_BITS).view(torch.float32)
        scaled = x / scale.clamp(min=F32_SMALLEST_NORMAL)
    # Clamp first: float32 -> float8_e4m3fn overflows to NaN on CPU before torch 2.13.
    return scaled.clamp(-limit, limit).to(elem_dtype)


def _rceil_reciprocal(exponent: Tensor) -> Tensor:
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


def blocked_scales_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape in the 128x4 blocked layout of scales [..., K] of ``shape``."""
    *leading, width = shape
    return 32 * ((math.prod(leading) + 127) // 128), 16 * ((width + 3) // 4)


def block_size_of(values: Sequence[int], scales: Sequence[int]) -> int:
    """D / K, of the shapes of values [..., D] and row-major scales [..., K].

    Raises:
        ValueError: the shapes do not belong together.
    """
    if (
        len(scales) != len(values)
        or not scales
        or tuple(scales[:-1]) != tuple(values[:-1])
        or scales[-1] == 0
        or values[-1] % scales[-1] != 0
    ):
        raise ValueError(
            f"scales has shape {tuple(scales)}; values of shape {tuple(values)} need row-major "
            "scales, [..., D / block size]; those of the 128x4 layout are for matrix "
            "multiplications only"
        )
    return values[-1] // scales[-1]


def dequantize_blocks(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``functional.mx_dequantize`` of scales that are known to be row-major."""
    blocks = values.to(dtype).reshape(*scales.shape, block_size_of(values.shape, scales.shape))
    return (blocks * e8m0_to_float(scales).to(dtype).unsqueeze(-1)).reshape(values.shape)


def blocked_scales(scales: Tensor) -> Tensor:
    """Scales in the 128x4 blocked layout that ``torch._scaled_mm`` reads.

    Tiles of 128 rows by 4 blocks, padded with zero bytes; row 32 i + j of a tile lies at [j, i].
    Source: cuBLAS documentation, "1D block scaling factors layout".

    Args:
        scales: [..., K], one byte per block or any other number.

    Returns:
        [32 ceil(T / 128), 16 ceil(K / 4)], T the product of the leading dimensions.
    """
    width = scales.shape[-1]
    rows = scales.reshape(-1, width)
    height = rows.shape[0]
    tiles_down, tiles_across = (height + 127) // 128, (width + 3) // 4
    padded = F.pad(rows, (0, 4 * tiles_across - width, 0, 128 * tiles_down - height))
    tiles = padded.reshape(tiles_down, 4, 32, tiles_across, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(32 * tiles_down, 16 * tiles_across)
