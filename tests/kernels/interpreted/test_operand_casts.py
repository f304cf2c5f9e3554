"""The kernel that casts operands against ``functional``; how closely, ``operand_casts`` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edge_cases import STACKED_EDGE_CASES, EdgeCase
from kernel_rows import DEVICE
from operand_casts import (
    BF16,
    BLOCKS_OF_256,
    F16,
    F32,
    MXFP4,
    OPERANDS,
    assert_cast,
    differing,
    expected,
    noise,
    read,
)
from pairwise import each_value

from mxnorm_pass.functional import Hadamard, OperandCast
from mxnorm_pass.kernels.coverage import uncovered_operand
from mxnorm_pass.kernels.operand_casts import Tiling, operand_casts
from mxnorm_pass.numerics.formats import ELEMENTS, BlockFormat
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import Matmul, Use


@each_value(operand=OPERANDS, transposed=[False, True], dequantize=[None, BF16])
def test_casts(operand: Any, transposed: bool, dequantize: Any) -> None:
    check(Operand(*operand, "wgrad", Use.LEFT), transposed, dequantize)


@each_value(
    use=[("dgrad", Use.LEFT), ("wgrad", Use.LEFT), ("wgrad", Use.RIGHT)],
    dtype=[BF16, F32, F16],
    shape=[(384, 128), (128, 640)],
)
def test_reads(use: tuple[Matmul, Use], dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(Operand(*OPERANDS["both"], *use), shape[0] > shape[1], F32, dtype, shape)


def check(
    of: Operand,
    transposed: bool,
    dequantize: torch.dtype | None,
    dtype: torch.dtype = BF16,
    shape: tuple[int, int] = (128, 256),
) -> None:
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


EDGE_FORMATS = {
    "e4m3fn": "rceil", "e5m2": "floor", "e2m3": "ceil", "e3m2": "even", "e2m1": "floor"
}  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("case", STACKED_EDGE_CASES, ids=str)
@pytest.mark.parametrize("element, mode", EDGE_FORMATS.items())
def test_edge_cases(element: str, mode: Any, case: EdgeCase, rounding: Any) -> None:
    fmt = BlockFormat(ELEMENTS[element], mode)
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
