"""The kernel that finds the largest magnitude behind a transform, against ``functional``."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_rows import DEVICE
from operand_casts import BF16, F32, KEY, RIGHT_KEY, noise, seed
from pairwise import each_value

from mxnorm_pass.functional import Draw, Hadamard, OperandCast, block_format
from mxnorm_pass.kernels.operand_absmax import operand_absmax
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import Use

NVFP4 = OperandCast(block_format("nvfp4"))


@each_value(
    hadamard=[Hadamard(16, "fixed"), Hadamard(64), Hadamard(2, "none"), Hadamard(128)],
    transposed=[False, True],
    dtype=[BF16, F32],
)
def test_absmax(hadamard: Hadamard, transposed: bool, dtype: torch.dtype) -> None:
    x = noise(384, 1152, dtype)
    read = OperandRead(Operand(NVFP4, hadamard, "wgrad", Use.LEFT), seed(), KEY, RIGHT_KEY)
    got = operand_absmax(x, transposed, read)
    draw = Draw(seed() + KEY, "wgrad", seed() + RIGHT_KEY)
    source = x.t() if transposed else x
    want = hadamard.transform(source.double().float(), draw).abs().amax()
    # Of g numbers, summed up in another order, and the root.
    tolerance = (hadamard.size + 2) * 2.0**-24 * math.sqrt(hadamard.size)
    torch.testing.assert_close(got, want.reshape(1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_what_is_no_number_shows(special: float) -> None:
    x = noise(64, 64)
    x[5, 7] = special
    read = OperandRead(Operand(NVFP4, Hadamard(16, "fixed"), "wgrad", Use.LEFT))
    assert not operand_absmax(x, False, read).isfinite()
    assert operand_absmax(torch.zeros(64, 64, dtype=BF16, device=DEVICE), True, read) == 0
