"""Block formats as data: element type, block size, scales.

The formats are those of the OCP Microscaling (MX) specification v1.0. Ops, graphs and reports know
a format by its name, "mxfp8 e4m3fn rceil block 32"; :func:`block_format` reads it back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
        name: "e4m3fn".
        family: name of the MX format with such elements, "mxfp8".
        dtype: of the tensor that holds elements.
        max: largest finite value.
        max_exponent: exponent of the largest finite value, floor(log2(max)).
        mantissa_bits: explicit mantissa bits.
    """

    name: str
    family: str
    dtype: torch.dtype
    max: float
    max_exponent: int
    mantissa_bits: int

    @property
    def max_mantissa(self) -> int:
        """Mantissa bits of ``max`` as float32; 0x600000 where ``max`` is 1.75 * 2**max_exponent."""
        return round((self.max / 2.0**self.max_exponent - 1) * 2**F32_MANTISSA_BITS)


ELEMENTS: Final = {
    element.name: element
    for element in (
        ElementFormat("e4m3fn", "mxfp8", torch.float8_e4m3fn, 448.0, 8, 3),
        ElementFormat("e5m2", "mxfp8", torch.float8_e5m2, 57344.0, 15, 2),
    )
}
# dtypes that say by themselves what their elements are, as in casts that libraries write.
ELEMENT_DTYPES: Final = {element.dtype: element for element in ELEMENTS.values()}


@dataclass(frozen=True)
class BlockFormat:
    """Everything that names one cast to blocks of elements with a shared scale.

    Attributes:
        element: type of the elements.
        scale_mode: how a block's absmax becomes its scale, see ``e8m0.e8m0_exponent``.
        block_size: elements that share one scale; 32 in MX formats.
        scale_dtype: of the tensor that holds the scales.
        levels: of scaling: 1, a scale per block; 2, one per tensor besides.
    """

    element: ElementFormat = ELEMENTS["e4m3fn"]
    scale_mode: CastMode = "rceil"
    block_size: int = MX_BLOCK_SIZE
    scale_dtype: torch.dtype = torch.float8_e8m0fnu
    levels: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(
                f"block_size is {self.block_size}; it must be an integer of at least 1"
            )
        if self.scale_mode not in CAST_MODES:
            raise ValueError(f"scale_mode is {self.scale_mode!r}; allowed: {', '.join(CAST_MODES)}")

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
        return (
            f"{self.element.family} {self.element.name} {self.scale_mode} block {self.block_size}"
        )

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[..., K] of values [..., D]."""
        return (*shape[:-1], shape[-1] // self.block_size)

    def __str__(self) -> str:
        return self.name


# Short names, of what each format is by default.
FORMATS: Final = {"mxfp8": BlockFormat()}
_NAME = re.compile(r"(?P<family>\S+) (?P<element>\S+) (?P<mode>\S+) block (?P<size>\d+)")


@lru_cache(maxsize=256)
def block_format(name: str | BlockFormat) -> BlockFormat:
    """The format of that name, be it a short one ("mxfp8") or in full.

    Raises:
        ValueError: there is none; the message lists what is allowed.
    """
    if isinstance(name, BlockFormat):
        return name
    if name in FORMATS:
        return FORMATS[name]
    parts = _NAME.fullmatch(name)
    element = ELEMENTS.get(parts["element"]) if parts else None
    if not parts or element is None or element.family != parts["family"]:
        raise _no_format(name)
    mode, block_size = parts["mode"], int(parts["size"])
    if mode not in CAST_MODES or block_size < 1:
        raise _no_format(name)
    default = FORMATS[element.family]
    return replace(default, element=element, scale_mode=mode, block_size=block_size)


def _no_format(name: str) -> ValueError:
    elements = ", ".join(f"'{e.family} {e.name}'" for e in ELEMENTS.values())
    return ValueError(
        f"format is {name!r}; allowed: {', '.join(map(repr, FORMATS))}, or one of {elements} "
        f"followed by a scale mode ({', '.join(CAST_MODES)}) and 'block <size of at least 1>'"
    )


def element_of(dtype: torch.dtype) -> ElementFormat:
    """The element format of ``dtype``; a ValueError names the dtypes that are allowed."""
    if dtype not in ELEMENT_DTYPES:
        allowed = ", ".join(str(d) for d in ELEMENT_DTYPES)
        raise ValueError(f"elem_dtype is {dtype}; allowed: {allowed}")
    return ELEMENT_DTYPES[dtype]
