"""Operands for kernels: what they are specialised on, where they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.kernels.rows import element_constants
from mxnorm_pass.numerics.philox import matmul_number

# Values, scales (bytes), dequantised; None where nobody wants it.
OperandResults = tuple[Tensor | None, Tensor | None, Tensor | None]


def operand_results(x: Tensor, shape: tuple[int, int], read: OperandRead | None) -> OperandResults:
    """Uninitialised, of an operand of that shape."""
    if read is None:
        return None, None, None
    if read.dequantize is not None:
        return None, None, x.new_empty(shape, dtype=read.dequantize)
    fmt = read.format
    values = x.new_empty(fmt.values_shape(shape), dtype=fmt.elem_dtype)
    return values, x.new_empty(fmt.scales_shape(shape), dtype=torch.uint8), None


def typed_results(read: OperandRead | None, results: OperandResults) -> tuple[Tensor, ...]:
    values, scales, dequantized = results
    if read is None or values is None or scales is None:
        return () if dequantized is None else (dequantized,)
    return values, scales.view(read.format.scale_dtype)


def key_halves(read: OperandRead | None) -> tuple[int, int, int, int]:
    """What a kernel adds to the seed for roundings and for signs."""
    return (0, 0, 0, 0) if read is None else (*_halves(read.key), *_halves(read.right_key))


def key_constants(read: OperandRead, suffix: str) -> dict[str, int]:
    """The same, by the names of the kernels' arguments."""
    names = (f"{name}{suffix}_{half}" for name in ("key", "signs") for half in ("low", "high"))
    return dict(zip(names, key_halves(read), strict=True))


def _halves(key: int) -> tuple[int, int]:
    """Signed 32-bit integers, the lower one first."""
    low = key & 0xFFFFFFFF
    return low - ((low >> 31) << 32), key >> 32


def operand_constants(x: Tensor, read: OperandRead | None, suffix: str) -> dict[str, Any]:
    """What a kernel is specialised on; zeros where there is no such operand."""
    if read is None:
        return dict.fromkeys((name + suffix for name in _NAMES), 0)
    operand, fmt = read.operand, read.format
    values = element_constants(fmt, x.device) | {
        "BLOCK": fmt.block_size,
        "G": read.hadamard_size,
        "SIGNS": "none" if operand.hadamard is None else operand.hadamard.signs,
        "STOCHASTIC": operand.cast.is_stochastic,
        "HEADROOM": operand.cast.headroom,
        "SQUARE": operand.cast.square_blocks,
        "MATMUL": matmul_number(operand.matmul),
        "USE": int(operand.use),
    }
    return {name + suffix: value for name, value in values.items()}


_NAMES = (
    "BLOCK", "MODE", "ELEM_DTYPE", "BITS", "MAX_EXPONENT", "MANTISSA_BITS", "MAX_MANTISSA",
    "CONVERTS", "G", "SIGNS", "STOCHASTIC", "HEADROOM", "SQUARE", "MATMUL", "USE",
)  # fmt: skip
