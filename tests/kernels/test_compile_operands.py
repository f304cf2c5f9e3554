"""Kernels that cast operands compile for Hopper and both Blackwells without such a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from numerics import SPEC
from pairwise import each_value
from ptx import compiled, recorded_launches

from mxnorm_pass.functional import RECIPES
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both
from mxnorm_pass.kernels.operand_casts import operand_casts
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import Matmul, Use

BF16, F32 = torch.bfloat16, torch.float32
CAPABILITIES = (90, 100, 120)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def read(name: str, matmul: Matmul, use: Use, dequantize: torch.dtype | None) -> OperandRead:
    recipe = RECIPES[name].matmul(matmul)
    cast = recipe.left if use is Use.LEFT else recipe.right
    scale = empty(dtype=F32) if name == "nvfp4" else None
    operand = Operand(cast, recipe.hadamard, matmul, use)
    return OperandRead(operand, empty(dtype=torch.int64), 2**40 + 1, 2**41, scale, dequantize)


@pytest.mark.full
@each_value(recipe=list(RECIPES), capability=CAPABILITIES, dequantize=[None, BF16])
def test_both_casts_of_a_gradient(recipe: str, capability: int, dequantize: Any) -> None:
    sides = [read(recipe, matmul, Use.LEFT, dequantize) for matmul in ("dgrad", "wgrad")]
    kernel = compiled(lambda: operand_casts(empty(8192, 4096), *sides), capability)
    assert kernel.spilled_bytes == 0, kernel.log
    transforms = RECIPES[recipe].wgrad.hadamard is not None
    assert bool(re.search(r"(wgmma|mma)\S*\.f32\.bf16|tcgen05", kernel.ptx)) == transforms


@pytest.mark.full
@each_value(
    recipe=[name for name in RECIPES if name.startswith("mxfp4")],
    default=[(90, 4096), (90, 16384), (100, 8192), (120, 4096)],
    add=[False, True],
)
def test_a_norm_with_both_casts(recipe: str, default: tuple[int, int], add: bool) -> None:
    (capability, width), along_t = default, read(recipe, "wgrad", Use.RIGHT, None)
    x = empty(4096, width)
    kernel = compiled(
        lambda: norm_cast_both(
            x, x[0], None, SPEC, True, residual=x if add else None, along_t=along_t
        ),
        capability,
    )
    assert kernel.spilled_bytes == 0, kernel.log


def test_keys_of_64_bits_are_handed_on_in_halves() -> None:
    """As signed words of 32 bits: Inductor (torch 2.11) passes no larger integers."""
    for key in (0, 1, 2**31, 2**32 - 1, 2**62 - 1):
        side = OperandRead(Operand(RECIPES["mxfp4-sr"].dgrad.left, None, "dgrad", Use.LEFT),
                           empty(dtype=torch.int64), key, key)  # fmt: skip
        with recorded_launches() as launches:
            operand_casts(empty(64, 64), side, None)
        low, high = (launches[0].arguments[f"key_{half}"] for half in ("low", "high"))
        assert -(2**31) <= low < 2**31 and 0 <= high < 2**31
        assert (high << 32) + (low % 2**32) == key
