"""Which casts in the backward are those of the transposed norm output, and which are near misses."""
# ruff: noqa: E501

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from matching import BF16, EPS, huggingface
from numerics import E4M3, E5M2
from pairwise import each_value
from torch import Tensor, nn
from transposed_casts import (
    BOTH,
    FEATURES,
    IN_ROWS,
    WIDTH,
    assert_same_step,
    both_estimators,
    rows,
    step,
    step_without,
)

from mxnorm_pass import functional, ops
from mxnorm_pass.numerics.formats import BlockFormat


def _rounded(
    x: Tensor, mode: str = "rceil", elem_dtype: torch.dtype = E4M3, block_size: int = 32
) -> Tensor:
    name = BlockFormat.of(elem_dtype, mode, block_size).name
    return ops.dequantize(*ops.cast(x, name), name, x.dtype)


def _in_aten(x: Tensor) -> Tensor:
    return functional.mx_dequantize(*functional.mx_cast(x), x.dtype)


def _as_is(y: Tensor) -> Tensor:
    return _rounded(y.t()).t()


def _in_flat_blocks(y: Tensor) -> Tensor:
    return _rounded(y.t().reshape(-1, 32)).reshape(y.shape[::-1]).t()


@torch._dynamo.allow_in_graph
class _OwnOps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, operand: str) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.operand = OPERANDS[operand]
        return _rounded(y) @ _rounded(weight).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ ctx.operand(y), None


class OwnOps(nn.Module):
    """norm -> linear, whose weight gradient multiplies what ``operand`` makes of its output."""

    def __init__(self, operand: str = "as is") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operand = operand
        self.gain = nn.Parameter((torch.rand(WIDTH) + 0.5).bfloat16())
        self.linear = nn.Linear(WIDTH, FEATURES, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = huggingface(x, self.gain, EPS)
        return (_OwnOps.apply(y, self.linear.weight, self.operand),)


def _also_in_high_precision(y: Tensor) -> Tensor:
    return _as_is(y) + y.abs()


SAME = {
    "as is": _as_is,
    "upcast before": lambda y: _rounded(y.float().t()).t().bfloat16(),
    "upcast after": lambda y: _rounded(y.t().float()).t().bfloat16(),
    "in blocks that lie flat": _in_flat_blocks,
    "permuted copy": lambda y: _rounded(y.permute(1, 0).contiguous()).t(),
    "in aten's ops": lambda y: _in_aten(y.t().contiguous()).t(),
    "also in high precision": _also_in_high_precision,
    "in another mode": lambda y: _rounded(y.t(), mode="floor").t(),
    "of another element type": lambda y: _rounded(y.t(), elem_dtype=E5M2).t(),
    "of another block size": lambda y: _rounded(y.t(), block_size=16).t(),
}
OTHER = {
    "not transposed": lambda y: _rounded(y),
    "transposed twice": lambda y: _rounded(y.t().contiguous().t()),
    "rounded to another dtype": lambda y: _rounded(y.half().t()).t().bfloat16(),
    "in another layout": lambda y: _in_aten(y.t()).t(),
    "scaled": lambda y: _rounded((2 * y).t()).t(),
    "reshaped before": lambda y: _rounded(y.reshape(-1, 32).t()).t().reshape(y.shape),
}


OPERANDS = {**SAME, **OTHER}


@each_value(operand=list(SAME), estimator=["mxnorm", "exact"])
def test_spellings(operand: str, estimator: str, monkeypatch: Any) -> None:
    module, x = OwnOps(operand), rows(64)
    got = step(module, x, estimator=estimator)
    assert got.fused_ops == BOTH
    assert_same_step(got, step_without(monkeypatch, module, x, estimator=estimator))


@each_value(operand=list(OTHER), estimator=["mxnorm", "exact"])
def test_near_misses(operand: str, estimator: str) -> None:
    module, x = OwnOps(operand), rows(64)
    got = step(module, x, estimator=estimator)
    assert got.fused_ops == IN_ROWS
    if estimator == "exact":
        assert_same_step(got, step(module, x, backend="aot_eager"))


@both_estimators
@pytest.mark.parametrize("count, fused", [(64, BOTH), (48, IN_ROWS)])
def test_blocks_that_reach_into_the_next_channel(
    count: int, fused: dict[str, int], estimator: str
) -> None:
    module, x = OwnOps("in blocks that lie flat"), rows(count)
    got = step(module, x, estimator=estimator)
    assert got.fused_ops == fused
    if estimator == "exact":
        assert_same_step(got, step(module, x, backend="aot_eager"))


def test_output_is_computed_only_for_those_who_still_read_it() -> None:
    """The products of the gradients of x and of the gain, and of the gain in the output."""
    counts = {}
    for name in ("as is", "also in high precision"):
        graph = step(OwnOps(name), rows(64)).report.graphs[0]
        counts[name] = graph.after.count('bf16[64, 128]" = torch.ops.aten.mul.Tensor')
    assert counts == {"as is": 2, "also in high precision": 3}


class TestGraph(expecttest.TestCase):
    def test_training_step_up_to_the_norms_vjp(self) -> None:
        graph = step(OwnOps(), rows(64)).report.graphs[0]
        vjp = graph.after.index("    _to_copy_4")
        self.assertExpectedInline(
            graph.after[:vjp],
            """\
def forward(primals_1, primals_2, primals_3, tangents_1):
    # primals_1: bf16[128]
    # primals_2: bf16[64, 128]
    # primals_3: bf16[64, 128]
    # tangents_1: bf16[64, 64]
    _to_copy: "f32[64, 128]" = torch.ops.aten._to_copy.default(primals_2, dtype=torch.float32)
    norm_cast_both_default = torch.ops.mxnorm_pass.norm_cast_both.default(primals_2, primals_1, None, None, 1e-05, 'mxnorm', 2.0, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16, torch.bfloat16, 'row-major', False)
    getitem_6: "f8e4m3fn[64, 128]" = getitem(norm_cast_both_default, 0)
    getitem_7: "f8e8m0fnu[64, 4]" = getitem(norm_cast_both_default, 1)
    getitem_8: "f32[64, 1]" = getitem(norm_cast_both_default, 2)
    getitem_9: "f8e4m3fn[128, 64]" = getitem(norm_cast_both_default, 3)
    getitem_10: "f8e8m0fnu[128, 2]" = getitem(norm_cast_both_default, 4)
    dequantize_default: "bf16[64, 128]" = torch.ops.mxnorm_pass.dequantize.default(getitem_6, getitem_7, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    # mean
    detach: "f32[64, 1]" = torch.ops.aten.detach.default(getitem_8)
    # -
    mul: "f32[64, 128]" = torch.ops.aten.mul.Tensor(_to_copy, getitem_8)
    _to_copy_1: "bf16[64, 128]" = torch.ops.aten._to_copy.default(mul, dtype=torch.bfloat16)
    convert_element_type_default: "f32[64, 128]" = torch.ops.prims.convert_element_type.default(primals_3, torch.float32)
    convert_element_type_default_1: "f32[128]" = torch.ops.prims.convert_element_type.default(primals_1, torch.float32)
    mul_tensor: "f32[64, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_default, convert_element_type_default_1)
    cast_default = torch.ops.mxnorm_pass.cast.default(mul_tensor, 'mxfp8 e4m3fn rceil block 32')
    getitem_11: "f8e4m3fn[64, 128]" = getitem(cast_default, 0)
    getitem_12: "f8e8m0fnu[64, 4]" = getitem(cast_default, 1)
    dequantize_1: "bf16[64, 128]" = torch.ops.mxnorm_pass.dequantize.default(getitem_11, getitem_12, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    t: "bf16[128, 64]" = torch.ops.aten.t.default(dequantize_1)
    mm: "bf16[64, 64]" = torch.ops.aten.mm.default(dequantize_default, t)
    #  (backward)
    mm_1: "bf16[64, 128]" = torch.ops.aten.mm.default(tangents_1, primals_3)
    t_1: "bf16[64, 64]" = torch.ops.aten.t.default(tangents_1)
    dequantize_2: "bf16[128, 64]" = torch.ops.mxnorm_pass.dequantize.default(getitem_9, getitem_10, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    t_3: "bf16[64, 128]" = torch.ops.aten.t.default(dequantize_2)
    mm_2: "bf16[64, 128]" = torch.ops.aten.mm.default(t_1, t_3)
    mul_4: "bf16[64, 128]" = torch.ops.aten.mul.Tensor(mm_1, _to_copy_1)
    mul_5: "bf16[64, 128]" = torch.ops.aten.mul.Tensor(mm_1, primals_1)
    sum_1: "bf16[1, 128]" = torch.ops.aten.sum.dim_IntList(mul_4, [0], True)
    view: "bf16[128]" = torch.ops.aten.view.default(sum_1, [128])
""",
        )
