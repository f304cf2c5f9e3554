"""The kernels of linears on MX operands compile for Hopper without such a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pairwise import each_value
from ptx import compiled

from mxnorm_pass.kernels.mx_linear import mx_linears

CAPABILITY = 90


def empty(*shape: int, dtype: torch.dtype) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.full
@each_value(
    rows=[1, 4, 16, 32],
    columns=[(4096,), (1024,), (14336,), (1000,), (14336, 14336), (4096, 1024, 1024)],
    width=[4096, 14336, 11008],
    has_bias=[False, True],
    dtype=[torch.bfloat16, torch.float32],
)
def test_linears_of_llama(
    rows: int, columns: tuple[int, ...], width: int, has_bias: bool, dtype: torch.dtype
) -> None:
    values, scales = torch.float8_e4m3fn, torch.float8_e8m0fnu
    x, *weights = (empty(n, width, dtype=values) for n in (rows, *columns))
    x_scales, *weight_scales = (empty(n, width // 32, dtype=scales) for n in (rows, *columns))
    biases = [empty(n, dtype=dtype) if has_bias else None for n in columns]
    kernel = compiled(
        lambda: mx_linears(x, x_scales, weights, weight_scales, biases, dtype), CAPABILITY
    )
    # With 32 rows some tiles take all registers; what is spilled then in Triton 3.9 is no more
    # than this. In 3.6 most of these spill nothing.
    assert kernel.spilled_bytes <= {1: 0, 4: 24, 16: 24, 32: 256}[rows], kernel.log
    assert "cvt.rn.f16x2.e4m3x2" in kernel.ptx and "wgmma" not in kernel.ptx
    if rows > 1:
        # Its sums are float32's, other than those of Hopper's products of float8, wgmma.
        assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in kernel.ptx
        # From memory to the tensor cores' registers without a detour.
        assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in kernel.ptx
        assert_copies_of_16_bytes(kernel.ptx)
    else:
        assert max(kernel.load_bits) == 128


@pytest.mark.full
@pytest.mark.parametrize("width", [128, 256, 512])
def test_a_single_step(width: int) -> None:
    values, scales = torch.float8_e4m3fn, torch.float8_e8m0fnu
    x, weight = (empty(16, width, dtype=values) for _ in range(2))
    x_scales, weight_scales = (empty(16, width // 32, dtype=scales) for _ in range(2))
    operands = (x, x_scales, [weight], [weight_scales], [None])
    kernel = compiled(lambda: mx_linears(*operands, torch.bfloat16), CAPABILITY)
    assert "mma.sync" in kernel.ptx


def assert_copies_of_16_bytes(ptx: str) -> None:
    """Except for those of both operands' scales, of which two warps have 8 bytes in a row."""
    copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", ptx)
    groups = ptx.count("cp.async.commit_group")
    assert len(copies) == ptx.count("cp.async.c") - groups
    narrow = [size for size in copies if size != "10"]
    assert narrow in ([], ["8"] * 2 * groups)
