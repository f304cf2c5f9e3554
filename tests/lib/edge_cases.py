"""Inputs at the borders of MX casts and norms, shared by the tests of every implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 32
WIDTH = 4 * BLOCK_SIZE

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits, where all NaNs count as one (the sign of zero does not)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not bool(_differs(a, b).any())


def describe_difference(a: Tensor, b: Tensor) -> str:
    """For assertion messages: the first element at which ``bits_equal`` fails."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} != {tuple(b.shape)} {b.dtype}"
    differs = _differs(a, b)
    where = differs.nonzero()
    if len(where) == 0:
        return "no difference"
    index = tuple(where[0].tolist())
    wide = torch.float64
    return (
        f"{len(where)} of {a.numel()} differ, first at {index}: "
        f"{a.to(wide)[index].item()!r} != {b.to(wide)[index].item()!r}"
    )


def _differs(a: Tensor, b: Tensor) -> Tensor:
    integer = _INTEGERS[a.dtype.itemsize]
    # float8 types have no isnan; every one of their values is exact in float32.
    wide_a, wide_b = (a.float(), b.float()) if a.dtype.itemsize == 1 else (a, b)
    both_nan = wide_a.isnan() & wide_b.isnan()
    return (a.contiguous().view(integer) != b.contiguous().view(integer)) & ~both_nan


@dataclass(frozen=True)
class EdgeCase:
    """One named input.

    Attributes:
        name: what is special about it; also the test id.
        x: builds [rows, D] for a dtype, float32 or bfloat16, D divisible by ``BLOCK_SIZE``.
    """

    name: str
    x: Callable[[torch.dtype], Tensor]

    def __str__(self) -> str:
        return self.name


def _noise(rows: int = 2, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    return torch.randn(rows, width, generator=generator)


def _planted(*values: float, block: int = 1) -> Callable[[torch.dtype], Tensor]:
    """Gaussian rows with ``values`` next to each other in one block of the first row."""

    def build(dtype: torch.dtype) -> Tensor:
        x = _noise().to(dtype)
        start = block * BLOCK_SIZE + 3
        x[0, start : start + len(values)] = torch.tensor(values, dtype=dtype)
        return x

    return build


def _alternating(magnitude: Tensor | float, dtype: torch.dtype, rows: int = 2) -> Tensor:
    signs = 1.0 - 2.0 * (torch.arange(WIDTH) % 3 == 1)
    return (torch.ones(rows, 1) * signs * magnitude).to(dtype)


def _zero_rows(dtype: torch.dtype) -> Tensor:
    x = _noise(4).to(dtype)
    x[1] = 0.0
    x[2] = -0.0
    return x


def _zero_blocks(dtype: torch.dtype) -> Tensor:
    x = _noise(3).to(dtype)
    x[0, :BLOCK_SIZE] = 0.0
    x[1, BLOCK_SIZE:] = 0.0
    return x


def _subnormals(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    x = torch.linspace(0, 1 / info.eps - 1, 2 * WIDTH).round().double().reshape(2, WIDTH) * smallest
    x[:, ::3] *= -1
    x[1, :BLOCK_SIZE] = smallest
    return x.to(dtype)


def _largest_finite(dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    x = _noise(3).to(dtype)
    x[0] = _alternating(largest, dtype, rows=1)
    x[1, 5] = largest
    x[2, BLOCK_SIZE : 2 * BLOCK_SIZE] = -largest
    return x


def _smallest_normals(dtype: torch.dtype) -> Tensor:
    smallest = torch.finfo(dtype).smallest_normal
    multiples = 1.0 + (torch.arange(WIDTH) % 8)
    return torch.cat([_alternating(smallest, dtype, 1), _alternating(smallest * multiples, dtype)])


def _outlier_channel(dtype: torch.dtype) -> Tensor:
    x = _noise(4)
    x[:, 70] *= 1000.0
    return x.to(dtype)


def _powers_of_two(dtype: torch.dtype) -> Tensor:
    """Every exponent from -133 to 127 is some block's maximum."""
    exponents = torch.arange(-133, 128, 2).double()
    blocks = torch.exp2(exponents)[:, None] * torch.exp2(-torch.arange(BLOCK_SIZE).double())
    blocks[:, 1::2] *= -1
    rows = blocks[: len(blocks) // 4 * 4].reshape(-1, WIDTH)
    shifted = (2 * blocks[-4:]).clamp(-(2.0**127), 2.0**127).reshape(-1, WIDTH)
    return torch.cat([rows, shifted]).to(dtype)


def _around(significands: Sequence[float]) -> Callable[[torch.dtype], Tensor]:
    """Block maxima s * 2^k, one ulp above and one below, over the range of k."""

    def build(dtype: torch.dtype) -> Tensor:
        k = torch.arange(-126, 127, 7).double()
        s = torch.tensor(significands, dtype=torch.float64)
        centre = torch.exp2(k)[:, None] * s
        centre = centre.flatten().to(dtype)
        up = torch.nextafter(centre, torch.tensor(math.inf, dtype=dtype))
        down = torch.nextafter(centre, torch.tensor(0.0, dtype=dtype))
        half = centre / 2
        maxima = torch.stack([centre, up, down, half], dim=-1)
        x = maxima.unsqueeze(-1) * torch.linspace(0.0, 1.0, BLOCK_SIZE).to(dtype)
        x[..., ::2] *= -1
        return x.flatten(-2)

    return build


def _between_elements(dtype: torch.dtype) -> Tensor:
    """Midpoints between elements and their neighbours, under a scale of 1 where 448 or 57344 fit.

    The rows are for e4m3fn and e5m2: large, smallest normal, subnormal, and around half of the
    smallest subnormal.
    """
    significands = (torch.arange(BLOCK_SIZE).double() + BLOCK_SIZE) / BLOCK_SIZE
    exponents = torch.tensor([[7, -6, -9, -10], [14, -14, -16, -17]]).double()
    x = torch.exp2(exponents).unsqueeze(-1) * significands
    x[..., 1::2] *= -1
    x[0, :, 1], x[1, :, 1] = 448.0, 57344.0
    return x.reshape(2, WIDTH).to(dtype)


def _equal_magnitudes(dtype: torch.dtype) -> Tensor:
    x = _noise(3)
    x[0] = _alternating(0.7, torch.float32, rows=1)
    x[1, :BLOCK_SIZE] = 1.5
    x[2, 0], x[2, 7], x[2, 31] = 5.0, -5.0, 5.0
    return x.to(dtype)


def _mixed_scales(dtype: torch.dtype) -> Tensor:
    exponents = torch.arange(-100, 101, 20).double()
    return (_noise(len(exponents)).double() * torch.exp2(exponents)[:, None]).to(dtype)


def _one_block(dtype: torch.dtype) -> Tensor:
    x = _noise(5, BLOCK_SIZE)
    x[3] = 0.0
    x[4, 9] = 1e4
    return x.to(dtype)


EDGE_CASES: tuple[EdgeCase, ...] = (
    EdgeCase("zero_rows", _zero_rows),
    EdgeCase("zero_blocks", _zero_blocks),
    EdgeCase("one_nan", _planted(math.nan)),
    EdgeCase("positive_inf", _planted(math.inf)),
    EdgeCase("negative_inf", _planted(-math.inf)),
    EdgeCase("both_infs", _planted(math.inf, -math.inf)),
    EdgeCase("nan_and_inf", _planted(math.nan, math.inf, -math.inf)),
    EdgeCase("subnormals", _subnormals),
    EdgeCase("largest_finite", _largest_finite),
    EdgeCase("smallest_normals", _smallest_normals),
    EdgeCase("outlier_channel", _outlier_channel),
    EdgeCase("powers_of_two", _powers_of_two),
    EdgeCase("around_powers_of_two", _around([1.0])),
    # 448 = 1.75 * 2^8 and 57344 = 1.75 * 2^15: where "rceil" moves to the next scale.
    EdgeCase("around_largest_element", _around([1.75])),
    # 6 = 1.5 * 2^2 and 7.5 = 1.875 * 2^2, of e2m1 and e2m3; 28, of e3m2, is 1.75 * 2^4.
    EdgeCase("around_largest_of_few_bits", _around([1.5, 1.875])),
    # Half an element ulp below a power of two: where "even" moves, for 3, 2 and 1 mantissa bits.
    EdgeCase("around_even_rounding", _around([1.9375, 1.875, 1.75])),
    EdgeCase("between_elements", _between_elements),
    EdgeCase("equal_magnitudes", _equal_magnitudes),
    EdgeCase("mixed_scales", _mixed_scales),
    EdgeCase("one_block", _one_block),
)


def _all_in_blocks_of_rows(dtype: torch.dtype) -> Tensor:
    cases = [case.x(dtype) for case in EDGE_CASES]
    wide = [x for x in cases if x.shape[-1] == WIDTH]
    return torch.cat(
        [x[torch.arange(-(-len(x) // BLOCK_SIZE) * BLOCK_SIZE) % len(x)] for x in wide]
    )


# The same in two tensors, for kernels whose interpreter takes its time for each launch. A case
# repeats its rows to whole blocks of them, so that casts along columns meet it alone.
STACKED_EDGE_CASES = (
    EdgeCase("all_of_one_width", _all_in_blocks_of_rows),
    EdgeCase("one_block", lambda dtype: _one_block(dtype).repeat(BLOCK_SIZE, 1)),
)
