"""Block formats as data: element type, block size, scales.

The formats are those of the OCP Microscaling (MX) specification v1.0, and NVFP4. Ops, graphs and
reports know a format by its name, "mxfp8 e4m3fn rceil block 32"; :func:`block_format` reads it
back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import torch

ScaleMode = Literal["rceil", "floor", "ceil", "even"]
CastMode = Literal[ScaleMode, "rceil-log2"]
SCALE_MODES: Final[tuple[ScaleMode, ...]] = get_args(ScaleMode)
CAST_MODES: Final[tuple[CastMode, ...]] = get_args(CastMode)
# Of scales that are no powers of two; casts are not searched for it.
NEAREST: Final = "nearest"

MX_BLOCK_SIZE: Final = 32
F32_MANTISSA_BITS: Final = 23
F32_MANTISSA_MASK: Final = (1 << F32_MANTISSA_BITS) - 1
F32_SMALLEST_NORMAL: Final = 2.0**-126


@dataclass(frozen=True)
class ElementFormat:
    """The element type of an MX format (OCP MX specification, section 5.3).

    Attributes:
        name: "e4m3fn".
        bits: of an element.
        dtype: of the tensor that holds elements. Bytes hold two of 4 bits, the first in the lower
            half, as ``torch.float4_e2m1fn_x2`` does, which few ops take; or one of 6 bits.
        max: largest finite value.
        max_exponent: exponent of the largest finite value, floor(log2(max)).
        min_exponent: exponent of the smallest normal value.
        mantissa_bits: explicit mantissa bits.
    """

    name: str
    bits: Literal[8, 6, 4]
    dtype: torch.dtype
    max: float
    max_exponent: int
    min_exponent: int
    mantissa_bits: int

    @property
    def per_byte(self) -> int:
        """Elements in one byte."""
        return 2 if self.bits == 4 else 1

    @property
    def max_mantissa(self) -> int:
        """Mantissa bits of ``max`` as float32; 0x600000 where ``max`` is 1.75 * 2**max_exponent."""
        return round((self.max / 2.0**self.max_exponent - 1) * 2**F32_MANTISSA_BITS)


ELEMENTS: Final = {
    element.name: element
    for element in (
        ElementFormat("e4m3fn", 8, torch.float8_e4m3fn, 448.0, 8, -6, 3),
        ElementFormat("e5m2", 8, torch.float8_e5m2, 57344.0, 15, -14, 2),
        ElementFormat("e2m3", 6, torch.uint8, 7.5, 2, 0, 3),
        ElementFormat("e3m2", 6, torch.uint8, 28.0, 4, -2, 2),
        ElementFormat("e2m1", 4, torch.uint8, 6.0, 2, 0, 1),
    )
}
# dtypes to which a conversion is a rounding to elements, as in casts that libraries write.
ELEMENT_DTYPES: Final = {e.dtype: e for e in ELEMENTS.values() if e.bits == 8}


@dataclass(frozen=True)
class BlockFormat:
    """Everything that names one cast to blocks of elements with a shared scale.

    Attributes:
        element: type of the elements.
        scale_mode: how a block's absmax becomes its scale, see ``e8m0.e8m0_exponent``; of scales
            in e4m3 "nearest".
        block_size: elements that share one scale; 32 in MX formats, 16 in NVFP4.
        scale_dtype: of the tensor that holds the scales; ``torch.float8_e4m3fn`` in NVFP4, whose
            tensors may have a scale of their own besides (``Quantized.tensor_scale``).
    """

    element: ElementFormat = ELEMENTS["e4m3fn"]
    scale_mode: CastMode | Literal["nearest"] = "rceil"
    block_size: int = MX_BLOCK_SIZE
    scale_dtype: torch.dtype = torch.float8_e8m0fnu

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(
                f"block_size is {self.block_size}; it must be an integer of at least 1"
            )
        modes = CAST_MODES if self.has_e8m0_scales else (NEAREST,)
        if self.scale_mode not in modes:
            raise ValueError(f"scale_mode is {self.scale_mode!r}; allowed: {', '.join(modes)}")
        if self.block_size % self.element.per_byte != 0:
            raise ValueError(
                f"block_size is {self.block_size}; elements {self.element.name} need an even one, "
                "as two share a byte"
            )

    @classmethod
    def of(
        cls,
        elem_dtype: torch.dtype = torch.float8_e4m3fn,
        scale_mode: CastMode = "rceil",
        block_size: int = MX_BLOCK_SIZE,
    ) -> BlockFormat:
        """The MX format of a dtype; a ValueError names what is wrong and what is allowed."""
        return cls(element_of(elem_dtype), scale_mode, block_size)

    @property
    def has_e8m0_scales(self) -> bool:
        """Are its scales powers of two, as in MX formats?"""
        return self.scale_dtype is torch.float8_e8m0fnu

    @property
    def family(self) -> str:
        """What formats that differ in elements, scale mode and block size share: "mxfp8"."""
        return f"{'mx' if self.has_e8m0_scales else 'nv'}fp{self.element.bits}"

    @property
    def elem_dtype(self) -> torch.dtype:
        """Of the tensor that holds the elements."""
        return self.element.dtype

    @property
    def without_log2(self) -> BlockFormat:
        """The same format with "rceil" in the place of "rceil-log2"."""
        return replace(self, scale_mode="rceil") if self.scale_mode == "rceil-log2" else self

    @property
    def name(self) -> str:
        """What ops, graphs and reports call it."""
        return f"{self.family} {self.element.name} {self.scale_mode} block {self.block_size}"

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[..., K] of a tensor [..., D]."""
        return (*shape[:-1], shape[-1] // self.block_size)

    def values_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[..., D], or [..., D / 2] where two elements share a byte, of a tensor [..., D]."""
        return (*shape[:-1], shape[-1] // self.element.per_byte)

    def shape_of(self, values: Sequence[int]) -> tuple[int, ...]:
        """[..., D] of the tensor whose values have that shape."""
        return (*values[:-1], *(n * self.element.per_byte for n in values[-1:]))

    def __str__(self) -> str:
        return self.name


# Short names, of what each format is by default.
FORMATS: Final = {
    "mxfp8": BlockFormat(),
    "mxfp6": BlockFormat(ELEMENTS["e2m3"]),
    "mxfp4": BlockFormat(ELEMENTS["e2m1"]),
    "nvfp4": BlockFormat(ELEMENTS["e2m1"], NEAREST, 16, torch.float8_e4m3fn),
}
_NAME = re.compile(
    r"(?P<family>\S+) (?P<element>\S+)(?: (?P<mode>\S+) block (?P<size>\d+))?", re.ASCII
)


@lru_cache(maxsize=256)
def block_format(name: str | BlockFormat) -> BlockFormat:
    """The format of that name: "mxfp8", "mxfp8 e5m2", or in full.

    Raises:
        ValueError: there is none; the message lists what is allowed.
    """
    if isinstance(name, BlockFormat):
        return name
    if name in FORMATS:
        return FORMATS[name]
    parts = _NAME.fullmatch(name)
    element = ELEMENTS.get(parts["element"]) if parts else None
    family = FORMATS.get(parts["family"]) if parts else None
    if not parts or element is None or family is None or element.bits != family.element.bits:
        raise _no_format(name)
    mode: Any = parts["mode"] or family.scale_mode
    size = int(parts["size"] or family.block_size)
    try:
        return replace(family, element=element, scale_mode=mode, block_size=size)
    except ValueError as error:
        raise _no_format(name) from error


def _no_format(name: str) -> ValueError:
    short = ", ".join(map(repr, FORMATS))
    elements = ", ".join(
        f"'{family} {element.name}'"
        for family, fmt in FORMATS.items()
        for element in ELEMENTS.values()
        if element.bits == fmt.element.bits
    )
    return ValueError(
        f"format is {name!r}; allowed: {short}, or one of {elements}, alone or followed by a scale "
        f"mode ({', '.join(CAST_MODES)}; of nvfp4 {NEAREST}) and 'block <size of at least 1>', "
        "even where elements have 4 bits"
    )


def element_of(dtype: torch.dtype) -> ElementFormat:
    """The element format of ``dtype``; a ValueError names the dtypes that are allowed."""
    if dtype not in ELEMENT_DTYPES:
        allowed = ", ".join(str(d) for d in ELEMENT_DTYPES)
        raise ValueError(f"elem_dtype is {dtype}; allowed: {allowed}")
    return ELEMENT_DTYPES[dtype]
