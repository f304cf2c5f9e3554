"""The kernel of both directions, its cast along T in another format, transformed or at random."""

from __future__ import annotations

from typing import Any

import torch
from formats import spec_with
from kernel_rows import DEVICE
from numerics import SPEC
from operand_casts import OPERANDS, RIGHT_KEY, assert_cast, expected, seed
from pairwise import each_value
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.kernels.norm_cast_both import Tiling, norm_cast_both
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.kernels.rows import RowTiling
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import Use

BF16, F32 = torch.bfloat16, torch.float32
TILING = Tiling(RowTiling(rows=64, chunks=1, warps=4), columns=64, lag=1)
NAMES = [name for name in OPERANDS if not name.startswith("nvfp4")]


def noise(*shape: int, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(*shape, generator=generator).to(BF16).to(DEVICE)


def read(operand: Any) -> OperandRead:
    of = Operand(*operand, "wgrad", Use.RIGHT)
    return OperandRead(of, seed(), RIGHT_KEY, RIGHT_KEY)


@each_value(name=NAMES, residual=[False, True])
def test_casts_along_t(name: str, residual: bool) -> None:
    check(name, residual=residual)


@each_value(
    estimator=["mxnorm", "exact"],
    format=["mxfp8", "mxfp4", "mxfp8 e4m3fn rceil block 64"],
    dequantize=[None, BF16],
)
def test_beside_each_cast_along_d(estimator: str, format: str, dequantize: Any) -> None:
    check("both", estimator, format, shape=(384, 192), dequantize=dequantize)


def check(
    name: str,
    estimator: str = "mxnorm",
    format: str = "mxfp8",
    residual: bool = False,
    shape: tuple[int, int] = (128, 256),
    dequantize: torch.dtype | None = None,
) -> None:
    spec = spec_with(SPEC, estimator=estimator, format=format, norm_dtype=BF16, out_dtype=BF16)
    x, weight = noise(*shape), noise(shape[1], number=1)
    added = noise(*shape, number=2) if residual else None
    options: dict[str, Any] = {"residual": added, "dequantize": dequantize, "config": TILING}
    along_t = read(OPERANDS[name])
    *results, values_t, scales_t = norm_cast_both(
        x, weight, None, spec, True, along_t=along_t, **options
    )
    total = x if added is None else x + added
    y = functional.normalize(total, results[-1], weight, BF16, BF16)
    assert_cast((values_t, scales_t), expected(y.t(), along_t.operand), along_t.operand)
    # Along D nothing changes.
    *plain, _, _ = norm_cast_both(x, weight, None, spec, True, **options)
    for got, want in zip(results, plain, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
