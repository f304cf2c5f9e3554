"""Block formats: how a block's absmax becomes a shared E8M0 scale, and elements are cast under it.

The formats are those of the OCP Microscaling (MX) specification v1.0. The scale modes, special
values and saturation follow torchao 0.18 (``torchao/prototype/mx_formats/mx_tensor.py::to_mx``)
bit for bit, so that a cast written there can be replaced by the one written here. Its RCEIL, which
takes float32's log2, is "rceil-log2"; "rceil" is what that approximates. Of bfloat16 and float16
both give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import torch

ScaleMode = Literal["rceil", "floor", "ceil", "even"]
CastMode = Literal[ScaleMode, "rceil-log2"]

SCALE_MODES: Final[tuple[ScaleMode, ...]] = get_args(ScaleMode)
CAST_MODES: Final[tuple[CastMode, ...]] = get_args(CastMode)

MX_BLOCK_SIZE: Final = 32

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
