"""Operands, and what ``functional`` makes of them, for tests of kernels that cast them.

Bit for bit where nothing is transformed. A transform sums up in another order: what it rounds
otherwise by less than a unit in the last place is another element only beside a boundary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from kernel_rows import DEVICE
from torch import Tensor

from mxnorm_pass.functional import (
    RECIPES,
    Hadamard,
    OperandCast,
    block_format,
    cast_operand,
    nvfp4_tensor_scale,
)
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.cast import Quantized
from mxnorm_pass.numerics.matmul import Operand, transform_operand
from mxnorm_pass.numerics.philox import Draw, Use

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED, KEY, RIGHT_KEY = 2**61 + 7, 2**50 + 1, 2**33 + 2**31 + 3
MXFP4 = OperandCast(block_format("mxfp4 e2m1 floor block 32"))
BLOCKS_OF_256 = block_format("mxfp8 e4m3fn floor block 256")
OPERANDS = {
    "nearest": (MXFP4, None),
    "stochastic": (replace(MXFP4, rounding="stochastic"), None),
    "transformed": (MXFP4, Hadamard(64)),
    "both": (replace(MXFP4, rounding="stochastic"), Hadamard(64)),
    "float8": (OperandCast(block_format("mxfp8")), None),
    "float8, stochastic": (OperandCast(block_format("mxfp8 e5m2"), "stochastic"), None),
    "six bits, stochastic": (OperandCast(block_format("mxfp6"), "stochastic"), Hadamard(2, "none")),
    "nvfp4, stochastic": (RECIPES["nvfp4"].wgrad.left, Hadamard(16, "fixed")),
    "nvfp4, squares": (RECIPES["nvfp4"].forward.right, None),
    "large pieces": (MXFP4, Hadamard(128)),
}


def seed() -> Tensor:
    return torch.tensor(SEED, device=DEVICE)


def noise(rows: int, columns: int, dtype: torch.dtype = BF16, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return (3 * torch.randn(rows, columns, generator=generator)).to(dtype).to(DEVICE)


def expected(x: Tensor, operand: Operand) -> Quantized:
    draw = Draw(seed() + KEY, operand.matmul, seed() + RIGHT_KEY)
    options: dict[str, Any] = {"hadamard": operand.hadamard, "draw": draw, "use": operand.use}
    scale = tensor_scale(x, operand)
    return cast_operand(x.contiguous(), operand.cast, tensor_scale=scale, **options)


def tensor_scale(x: Tensor, operand: Operand) -> Tensor | None:
    fmt = operand.cast.format
    if fmt is None or fmt.has_e8m0_scales:
        return None
    draw = Draw(seed() + KEY, operand.matmul, seed() + RIGHT_KEY)
    return nvfp4_tensor_scale(transform_operand(x, operand.hadamard, draw))


def read(x: Tensor, operand: Operand, dequantize: torch.dtype | None = None) -> OperandRead:
    # As ``ops.operands`` hands them on.
    key = KEY if operand.use is Use.LEFT else RIGHT_KEY
    scale = tensor_scale(x, operand)
    return OperandRead(operand, seed(), key, RIGHT_KEY, scale, dequantize)


def differing(got: Tensor, want: Tensor) -> float:
    """Share of bytes, or numbers, that differ."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.itemsize == 1:
        got, want = got.view(torch.uint8), want.view(torch.uint8)
    equal = (got == want) | ((got != got) & (want != want))
    return 1 - equal.double().mean().item()


def assert_cast(results: tuple[Tensor, ...], want: Quantized, operand: Operand) -> None:
    """Values and scales, or what they make."""
    wanted = (want.values, want.scales)
    if len(results) == 1:
        wanted = (want.dequantize(results[0].dtype),)
    # Half a unit of float32 moves a boundary of 2^-2 units by 2^-22: some in a million.
    allowed = 0.0 if operand.hadamard is None else 1e-3
    for got, expected in zip(results, wanted, strict=True):
        assert differing(got, expected) <= allowed
