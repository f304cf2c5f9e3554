"""The kernel of linears on MX operands compiles for Hopper without such a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each_value
from ptx import compiled

from mxnorm_pass.kernels.mx_linear import mx_linear

CAPABILITY = 90


def empty(*shape: int, dtype: torch.dtype) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.full
@each_value(
    rows=[1, 4, 16, 32],
    shape=[(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (1000, 11008)],
    has_bias=[False, True],
    dtype=[torch.bfloat16, torch.float32],
)
def test_linears_of_llama(
    rows: int, shape: tuple[int, int], has_bias: bool, dtype: torch.dtype
) -> None:
    (columns, width), values, scales = shape, torch.float8_e4m3fn, torch.float8_e8m0fnu
    x, x_scales = empty(rows, width, dtype=values), empty(rows, width // 32, dtype=scales)
    weight = empty(columns, width, dtype=values)
    weight_scales = empty(columns, width // 32, dtype=scales)
    bias = empty(columns, dtype=dtype) if has_bias else None
    kernel = compiled(
        lambda: mx_linear(x, x_scales, weight, weight_scales, bias, dtype), CAPABILITY
    )
    assert kernel.spilled_bytes == 0, kernel.log
    assert "cvt.rn.f16x2.e4m3x2" in kernel.ptx and "wgmma" not in kernel.ptx
    if rows > 1:
        # Its sums are float32's, other than those of Hopper's products of float8, wgmma.
        assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in kernel.ptx
        # From memory to where the tensor cores' registers are filled from, without a detour.
        assert "cp.async" in kernel.ptx and "ldmatrix" in kernel.ptx
