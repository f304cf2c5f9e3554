"""The kernel that casts operands against ``functional``.

Bit for bit where nothing is transformed. A transform sums up in another order: what it rounds
otherwise by less than a unit in the last place is another element only beside a boundary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from edge_cases import STACKED_EDGE_CASES, EdgeCase
from kernel_rows import DEVICE
from pairwise import each_value
from torch import Tensor

from mxnorm_pass.functional import (
    RECIPES,
    Hadamard,
    OperandCast,
    block_format,
    cast_operand,
    nvfp4_tensor_scale,
)
from mxnorm_pass.kernels.coverage import uncovered_operand
from mxnorm_pass.kernels.operand_casts import OperandRead, Tiling, operand_casts
from mxnorm_pass.numerics.cast import Quantized
from mxnorm_pass.numerics.formats import ELEMENTS, SCALE_MODES, BlockFormat
from mxnorm_pass.numerics.matmul import Operand, transform_operand
from mxnorm_pass.numerics.philox import Draw, Matmul, Use

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED, KEY, RIGHT_KEY = 2**61 + 7, 2**50 + 1, 3
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


@each_value(
    operand=OPERANDS,
    use=[("dgrad", Use.LEFT), ("wgrad", Use.LEFT), ("wgrad", Use.RIGHT)],
    transposed=[False, True],
    dequantize=[None, BF16, F32],
    dtype=[BF16, F32, F16],
    shape=[(128, 256), (384, 128), (128, 640)],
)
def test_casts(
    operand: Any,
    use: tuple[Matmul, Use],
    transposed: bool,
    dequantize: Any,
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> None:
    of = Operand(*operand, *use)
    x = noise(*shape, dtype)
    source = x.t() if transposed else x
    asked = read(source, of, dequantize)
    results = operand_casts(x, *((None, asked) if transposed else (asked, None)))
    assert_cast(results, expected(source, of), of)


def test_both_at_once_with_numbers_of_their_own() -> None:
    x = noise(192, 320)
    of_rows = Operand(*OPERANDS["both"], "dgrad", Use.LEFT)
    of_columns = Operand(*OPERANDS["both"], "wgrad", Use.LEFT)
    results = operand_casts(x, read(x, of_rows), read(x.t(), of_columns, BF16))
    assert_cast(results[:2], expected(x, of_rows), of_rows)
    assert_cast(results[2:], expected(x.t(), of_columns), of_columns)


@pytest.mark.parametrize("rows, columns", [(1, 64), (7, 128), (65, 32), (200, 96)])
def test_rows_need_be_no_multiple(rows: int, columns: int) -> None:
    x = noise(rows, columns)
    of = Operand(*OPERANDS["stochastic"], "dgrad", Use.LEFT)
    assert_cast(operand_casts(x, read(x, of), None), expected(x, of), of)
    assert_cast(operand_casts(x.t(), None, read(x, of)), expected(x, of), of)


@pytest.mark.parametrize("tiling", [Tiling(64, 1, 4), Tiling(128, 2, 8), Tiling(64, 8, 8)])
def test_tilings_change_nothing(tiling: Tiling) -> None:
    x = noise(128, 384)
    of = Operand(*OPERANDS["stochastic"], "wgrad", Use.LEFT)
    got = operand_casts(x, read(x, of), read(x.t(), of), config=tiling)
    assert_cast(got[:2], expected(x, of), of)
    assert_cast(got[2:], expected(x.t(), of), of)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("case", STACKED_EDGE_CASES, ids=str)
@each_value(element=ELEMENTS, mode=SCALE_MODES)
def test_edge_cases(element: Any, mode: Any, case: EdgeCase, rounding: Any) -> None:
    fmt = BlockFormat(element, mode)
    of = Operand(OperandCast(fmt, rounding), None, "dgrad", Use.LEFT)
    x = case.x(F32).to(DEVICE)
    values, scales = operand_casts(x, read(x, of), None)
    want = expected(x, of)
    assert differing(scales, want.scales) == 0
    # Where a scale is NaN the elements of a format without NaN say nothing.
    finite = (
        want.scales.float().isfinite().repeat_interleave(values.shape[-1] // scales.shape[-1], -1)
    )
    codes, wanted = (t.view(torch.uint8)[finite] for t in (values, want.values))
    assert torch.equal(codes, wanted)


def test_rows_may_be_part_of_a_matrix() -> None:
    x = noise(64, 128)[:, :64]
    of = Operand(*OPERANDS["nearest"], "dgrad", Use.LEFT)
    assert_cast(operand_casts(x, read(x, of), None), expected(x, of), of)


@pytest.mark.parametrize(
    "operand, words",
    [
        (Operand(OperandCast(), None, "dgrad", Use.LEFT), "no format"),
        (Operand(MXFP4, Hadamard(256), "dgrad", Use.LEFT), "at most 128"),
        (Operand(OperandCast(BLOCKS_OF_256), None, "dgrad", Use.LEFT), "blocks"),
    ],
)
def test_what_is_not_covered_says_why(operand: Operand, words: str) -> None:
    assert words in (uncovered_operand(noise(64, 256), operand) or "")
