"""One site before and after the pass, as people read it."""
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable

import expecttest
import torch
from pairwise import some
from reference import build_llama, token_ids
from torch import Tensor, nn
from torch._dynamo.backends import debugging
from torch._inductor import compile_fx

import mxnorm_pass


class Block(nn.Module):
    """HuggingFace's RMSNorm in front of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.linear(self.weight * x32.to(x.dtype))


class ResidualBlock(Block):
    """The same after a residual add, whose sum is passed on."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x + x.sigmoid()
        return super().forward(total), total


def graph(training: bool, **options: object) -> mxnorm_pass.Graph:
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=training)
    with torch.set_grad_enabled(training):
        report = mxnorm_pass.explain(Block(), x, options={"inner": "aot_eager", **options})
    assert len(report.fused) == 1
    return report.graphs[0]


class TestGraphs(expecttest.TestCase):
    def test_inference_before(self) -> None:
        self.assertExpectedInline(
            graph(training=False).before,
            """\
def forward(arg0_1, arg1_1, arg2_1):
    # arg0_1: bf16[4, 64]
    # arg1_1: bf16[64]
    # arg2_1: bf16[32, 64]
    _to_copy: "f32[4, 64]" = torch.ops.aten._to_copy.default(arg0_1, dtype=torch.float32)
    pow_1: "f32[4, 64]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy, 2)
    mean: "f32[4, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)
    add: "f32[4, 1]" = torch.ops.aten.add.Tensor(mean, 1e-06)
    rsqrt: "f32[4, 1]" = torch.ops.aten.rsqrt.default(add)
    mul: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy, rsqrt)
    _to_copy_1: "bf16[4, 64]" = torch.ops.aten._to_copy.default(mul, dtype=torch.bfloat16)
    mul_1: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(arg1_1, _to_copy_1)
    # linear
    t: "bf16[64, 32]" = torch.ops.aten.t.default(arg2_1)
    mm: "bf16[4, 32]" = torch.ops.aten.mm.default(mul_1, t)
    return (mm,)
""",
        )

    def test_inference_after_fold(self) -> None:
        self.assertExpectedInline(
            graph(training=False).after,
            """\
def forward(arg0_1, arg1_1, arg2_1):
    # arg0_1: bf16[4, 64]
    # arg1_1: bf16[64]
    # arg2_1: bf16[32, 64]
    norm_cast_default = torch.ops.mxnorm_pass.norm_cast.default(arg0_1, None, None, None, 1e-06, 'mxnorm', 2.0, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16, torch.bfloat16, 'row-major')
    getitem_4: "f8e4m3fn[4, 64]" = getitem(norm_cast_default, 0)
    getitem_5: "f8e8m0fnu[4, 2]" = getitem(norm_cast_default, 1)
    # linear
    convert_element_type_default: "f32[32, 64]" = torch.ops.prims.convert_element_type.default(arg2_1, torch.float32)
    convert_element_type_default_1: "f32[64]" = torch.ops.prims.convert_element_type.default(arg1_1, torch.float32)
    mul_tensor: "f32[32, 64]" = torch.ops.aten.mul.Tensor(convert_element_type_default, convert_element_type_default_1)
    cast_default_2 = torch.ops.mxnorm_pass.cast.default(mul_tensor, 'mxfp8 e4m3fn rceil block 32')
    getitem_7: "f8e4m3fn[32, 64]" = getitem(cast_default_2, 0)
    getitem_8: "f8e8m0fnu[32, 2]" = getitem(cast_default_2, 1)
    mm: "bf16[4, 32]" = torch.ops.mxnorm_pass.mx_linear.default(getitem_4, getitem_5, getitem_7, getitem_8, None, 'mxfp8 e4m3fn rceil block 32', 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    return (mm,)
""",
        )

    def test_inference_after_activation(self) -> None:
        self.assertExpectedInline(
            graph(training=False, gain="activation").after,
            """\
def forward(arg0_1, arg1_1, arg2_1):
    # arg0_1: bf16[4, 64]
    # arg1_1: bf16[64]
    # arg2_1: bf16[32, 64]
    norm_cast_default = torch.ops.mxnorm_pass.norm_cast.default(arg0_1, arg1_1, None, None, 1e-06, 'mxnorm', 2.0, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16, torch.bfloat16, 'row-major')
    getitem_4: "f8e4m3fn[4, 64]" = getitem(norm_cast_default, 0)
    getitem_5: "f8e8m0fnu[4, 2]" = getitem(norm_cast_default, 1)
    # linear
    cast_default_1 = torch.ops.mxnorm_pass.cast.default(arg2_1, 'mxfp8 e4m3fn rceil block 32')
    getitem_2: "f8e4m3fn[32, 64]" = getitem(cast_default_1, 0)
    getitem_3: "f8e8m0fnu[32, 2]" = getitem(cast_default_1, 1)
    mm: "bf16[4, 32]" = torch.ops.mxnorm_pass.mx_linear.default(getitem_4, getitem_5, getitem_2, getitem_3, None, 'mxfp8 e4m3fn rceil block 32', 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    return (mm,)
""",
        )

    def test_inference_after_exact(self) -> None:
        self.assertExpectedInline(
            graph(training=False, estimator="exact").after,
            """\
def forward(arg0_1, arg1_1, arg2_1):
    # arg0_1: bf16[4, 64]
    # arg1_1: bf16[64]
    # arg2_1: bf16[32, 64]
    norm_cast_default = torch.ops.mxnorm_pass.norm_cast.default(arg0_1, arg1_1, None, None, 1e-06, 'exact', 2.0, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16, torch.bfloat16, 'row-major')
    getitem_4: "f8e4m3fn[4, 64]" = getitem(norm_cast_default, 0)
    getitem_5: "f8e8m0fnu[4, 2]" = getitem(norm_cast_default, 1)
    # linear
    cast_default_1 = torch.ops.mxnorm_pass.cast.default(arg2_1, 'mxfp8 e4m3fn rceil block 32')
    getitem_2: "f8e4m3fn[32, 64]" = getitem(cast_default_1, 0)
    getitem_3: "f8e8m0fnu[32, 2]" = getitem(cast_default_1, 1)
    mm: "bf16[4, 32]" = torch.ops.mxnorm_pass.mx_linear.default(getitem_4, getitem_5, getitem_2, getitem_3, None, 'mxfp8 e4m3fn rceil block 32', 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    return (mm,)
""",
        )

    def test_inference_after_residual_add(self) -> None:
        """The sum is a result of the op."""
        x = torch.randn(4, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            report = mxnorm_pass.explain(ResidualBlock(), x, options={"gain": "activation"})
        self.assertExpectedInline(
            report.graphs[0].after,
            """\
def forward(arg0_1, arg1_1, arg2_1):
    # arg0_1: bf16[4, 64]
    # arg1_1: bf16[64]
    # arg2_1: bf16[32, 64]
    sigmoid: "bf16[4, 64]" = torch.ops.aten.sigmoid.default(arg0_1)
    add_norm_cast_default = torch.ops.mxnorm_pass.add_norm_cast.default(arg0_1, sigmoid, arg1_1, None, None, 1e-06, 'mxnorm', 2.0, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16, torch.bfloat16, 'row-major')
    add: "bf16[4, 64]" = getitem(add_norm_cast_default, 0)
    getitem_4: "f8e4m3fn[4, 64]" = getitem(add_norm_cast_default, 1)
    getitem_5: "f8e8m0fnu[4, 2]" = getitem(add_norm_cast_default, 2)
    # linear
    cast_default_1 = torch.ops.mxnorm_pass.cast.default(arg2_1, 'mxfp8 e4m3fn rceil block 32')
    getitem_2: "f8e4m3fn[32, 64]" = getitem(cast_default_1, 0)
    getitem_3: "f8e8m0fnu[32, 2]" = getitem(cast_default_1, 1)
    mm: "bf16[4, 32]" = torch.ops.mxnorm_pass.mx_linear.default(getitem_4, getitem_5, getitem_2, getitem_3, None, 'mxfp8 e4m3fn rceil block 32', 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    return (mm, add)
""",
        )

    def test_training_before(self) -> None:
        self.assertExpectedInline(
            graph(training=True).before,
            """\
def forward(primals_1, primals_2, primals_3, tangents_1):
    # primals_1: bf16[4, 64]
    # primals_2: bf16[64]
    # primals_3: bf16[32, 64]
    # tangents_1: bf16[4, 32]
    _to_copy: "f32[4, 64]" = torch.ops.aten._to_copy.default(primals_1, dtype=torch.float32)
    pow_1: "f32[4, 64]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy, 2)
    mean: "f32[4, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)
    add: "f32[4, 1]" = torch.ops.aten.add.Tensor(mean, 1e-06)
    rsqrt: "f32[4, 1]" = torch.ops.aten.rsqrt.default(add)
    detach: "f32[4, 1]" = torch.ops.aten.detach.default(rsqrt)
    mul: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy, rsqrt)
    _to_copy_1: "bf16[4, 64]" = torch.ops.aten._to_copy.default(mul, dtype=torch.bfloat16)
    mul_1: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(primals_2, _to_copy_1)
    # linear
    t: "bf16[64, 32]" = torch.ops.aten.t.default(primals_3)
    mm: "bf16[4, 32]" = torch.ops.aten.mm.default(mul_1, t)
    # linear (backward)
    t_1: "bf16[32, 4]" = torch.ops.aten.t.default(tangents_1)
    mm_1: "bf16[32, 64]" = torch.ops.aten.mm.default(t_1, mul_1)
    t_2: "bf16[64, 32]" = torch.ops.aten.t.default(mm_1)
    t_3: "bf16[32, 64]" = torch.ops.aten.t.default(t)
    mm_2: "bf16[4, 64]" = torch.ops.aten.mm.default(tangents_1, t_3)
    t_4: "bf16[32, 64]" = torch.ops.aten.t.default(t_2)
    #  (backward)
    mul_2: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(mm_2, primals_2)
    mul_3: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(mm_2, _to_copy_1)
    sum_1: "bf16[1, 64]" = torch.ops.aten.sum.dim_IntList(mul_3, [0], True)
    view: "bf16[64]" = torch.ops.aten.view.default(sum_1, [64])
    _to_copy_2: "f32[4, 64]" = torch.ops.aten._to_copy.default(mul_2, dtype=torch.float32, layout=torch.strided, device=cpu)
    mul_4: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_2, _to_copy)
    mul_5: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_2, rsqrt)
    sum_2: "f32[4, 1]" = torch.ops.aten.sum.dim_IntList(mul_4, [1], True)
    detach_1: "f32[4, 1]" = torch.ops.aten.detach.default(detach)
    pow_2: "f32[4, 1]" = torch.ops.aten.pow.Tensor_Scalar(detach_1, 3)
    mul_6: "f32[4, 1]" = torch.ops.aten.mul.Scalar(sum_2, -0.5)
    mul_7: "f32[4, 1]" = torch.ops.aten.mul.Tensor(mul_6, pow_2)
    expand: "f32[4, 64]" = torch.ops.aten.expand.default(mul_7, [4, 64])
    div: "f32[4, 64]" = torch.ops.aten.div.Scalar(expand, 64)
    pow_3: "f32[4, 64]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy, 1.0)
    mul_8: "f32[4, 64]" = torch.ops.aten.mul.Scalar(pow_3, 2.0)
    mul_9: "f32[4, 64]" = torch.ops.aten.mul.Tensor(div, mul_8)
    add_1: "f32[4, 64]" = torch.ops.aten.add.Tensor(mul_5, mul_9)
    _to_copy_3: "bf16[4, 64]" = torch.ops.aten._to_copy.default(add_1, dtype=torch.bfloat16, layout=torch.strided, device=cpu)
    return [mm, _to_copy_3, view, t_4]
""",
        )

    def test_training_after_true(self) -> None:
        self.assertExpectedInline(
            graph(training=True).after,
            """\
def forward(primals_1, primals_2, primals_3, tangents_1):
    # primals_1: bf16[4, 64]
    # primals_2: bf16[64]
    # primals_3: bf16[32, 64]
    # tangents_1: bf16[4, 32]
    _to_copy: "f32[4, 64]" = torch.ops.aten._to_copy.default(primals_1, dtype=torch.float32)
    norm_cast_default = torch.ops.mxnorm_pass.norm_cast.default(primals_1, None, None, None, 1e-06, 'mxnorm', 2.0, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16, torch.bfloat16, 'row-major')
    getitem_4: "f8e4m3fn[4, 64]" = getitem(norm_cast_default, 0)
    getitem_5: "f8e8m0fnu[4, 2]" = getitem(norm_cast_default, 1)
    getitem_6: "f32[4, 1]" = getitem(norm_cast_default, 2)
    # linear
    dequantize_default_2: "bf16[4, 64]" = torch.ops.mxnorm_pass.dequantize.default(getitem_4, getitem_5, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    # mean
    detach: "f32[4, 1]" = torch.ops.aten.detach.default(getitem_6)
    # -
    mul: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy, getitem_6)
    _to_copy_1: "bf16[4, 64]" = torch.ops.aten._to_copy.default(mul, dtype=torch.bfloat16)
    mul_2: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_1, primals_2)
    # linear
    t: "bf16[64, 32]" = torch.ops.aten.t.default(primals_3)
    convert_element_type_default: "f32[32, 64]" = torch.ops.prims.convert_element_type.default(primals_3, torch.float32)
    convert_element_type_default_1: "f32[64]" = torch.ops.prims.convert_element_type.default(primals_2, torch.float32)
    mul_tensor: "f32[32, 64]" = torch.ops.aten.mul.Tensor(convert_element_type_default, convert_element_type_default_1)
    cast_default_2 = torch.ops.mxnorm_pass.cast.default(mul_tensor, 'mxfp8 e4m3fn rceil block 32')
    getitem_7: "f8e4m3fn[32, 64]" = getitem(cast_default_2, 0)
    getitem_8: "f8e8m0fnu[32, 2]" = getitem(cast_default_2, 1)
    dequantize_default_1: "bf16[32, 64]" = torch.ops.mxnorm_pass.dequantize.default(getitem_7, getitem_8, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    permute_default: "bf16[64, 32]" = torch.ops.aten.permute.default(dequantize_default_1, [1, 0])
    mm: "bf16[4, 32]" = torch.ops.aten.mm.default(dequantize_default_2, permute_default)
    # linear (backward)
    t_1: "bf16[32, 4]" = torch.ops.aten.t.default(tangents_1)
    mm_1: "bf16[32, 64]" = torch.ops.aten.mm.default(t_1, mul_2)
    t_2: "bf16[64, 32]" = torch.ops.aten.t.default(mm_1)
    t_3: "bf16[32, 64]" = torch.ops.aten.t.default(t)
    mm_2: "bf16[4, 64]" = torch.ops.aten.mm.default(tangents_1, t_3)
    t_4: "bf16[32, 64]" = torch.ops.aten.t.default(t_2)
    #  (backward)
    mul_4: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(mm_2, _to_copy_1)
    mul_5: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(mm_2, primals_2)
    sum_1: "bf16[1, 64]" = torch.ops.aten.sum.dim_IntList(mul_4, [0], True)
    view: "bf16[64]" = torch.ops.aten.view.default(sum_1, [64])
    _to_copy_4: "f32[4, 64]" = torch.ops.aten._to_copy.default(mul_5, dtype=torch.float32, layout=torch.strided, device=cpu)
    mul_6: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_4, _to_copy)
    mul_7: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_4, getitem_6)
    sum_2: "f32[4, 1]" = torch.ops.aten.sum.dim_IntList(mul_6, [1], True)
    # mean (backward)
    detach_2: "f32[4, 1]" = torch.ops.aten.detach.default(detach)
    pow_2: "f32[4, 1]" = torch.ops.aten.pow.Tensor_Scalar(detach_2, 3)
    mul_8: "f32[4, 1]" = torch.ops.aten.mul.Tensor(pow_2, -0.5)
    mul_9: "f32[4, 1]" = torch.ops.aten.mul.Tensor(sum_2, mul_8)
    view_1: "f32[4, 2, 32]" = torch.ops.aten.view.default(_to_copy, [4, 2, 32])
    abs_1: "f32[4, 2, 32]" = torch.ops.aten.abs.default(view_1)
    amax: "f32[4, 2]" = torch.ops.aten.amax.default(abs_1, [-1])
    mul_10: "f32[4, 2]" = torch.ops.aten.mul.Tensor(amax, 0.17514652266431094)
    mul_11: "f32[4, 2]" = torch.ops.aten.mul.Tensor(mul_10, mul_9)
    unsqueeze: "f32[4, 2, 1]" = torch.ops.aten.unsqueeze.default(amax, -1)
    eq: "b8[4, 2, 32]" = torch.ops.aten.eq.Tensor(abs_1, unsqueeze)
    _to_copy_6: "f32[4, 2, 32]" = torch.ops.aten._to_copy.default(eq, dtype=torch.float32)
    sum_3: "f32[4, 2]" = torch.ops.aten.sum.dim_IntList(_to_copy_6, [-1])
    div: "f32[4, 2]" = torch.ops.aten.div.Tensor(mul_11, sum_3)
    unsqueeze_1: "f32[4, 2, 1]" = torch.ops.aten.unsqueeze.default(div, -1)
    sign: "f32[4, 2, 32]" = torch.ops.aten.sign.default(view_1)
    mul_12: "f32[4, 2, 32]" = torch.ops.aten.mul.Tensor(sign, _to_copy_6)
    mul_13: "f32[4, 2, 32]" = torch.ops.aten.mul.Tensor(mul_12, unsqueeze_1)
    view_2: "f32[4, 64]" = torch.ops.aten.view.default(mul_13, [4, 64])
    #  (backward)
    add_1: "f32[4, 64]" = torch.ops.aten.add.Tensor(mul_7, view_2)
    _to_copy_5: "bf16[4, 64]" = torch.ops.aten._to_copy.default(add_1, dtype=torch.bfloat16, layout=torch.strided, device=cpu)
    return [mm, _to_copy_5, view, t_4]
""",
        )

    def test_training_after_orthogonal(self) -> None:
        """The exact mean of squares is computed in the backward alone."""
        self.assertExpectedInline(
            graph(training=True, gradient="orthogonal").after,
            """\
def forward(primals_1, primals_2, primals_3, tangents_1):
    # primals_1: bf16[4, 64]
    # primals_2: bf16[64]
    # primals_3: bf16[32, 64]
    # tangents_1: bf16[4, 32]
    _to_copy: "f32[4, 64]" = torch.ops.aten._to_copy.default(primals_1, dtype=torch.float32)
    norm_cast_default = torch.ops.mxnorm_pass.norm_cast.default(primals_1, None, None, None, 1e-06, 'mxnorm', 2.0, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16, torch.bfloat16, 'row-major')
    getitem_4: "f8e4m3fn[4, 64]" = getitem(norm_cast_default, 0)
    getitem_5: "f8e8m0fnu[4, 2]" = getitem(norm_cast_default, 1)
    getitem_6: "f32[4, 1]" = getitem(norm_cast_default, 2)
    # linear
    dequantize_default_2: "bf16[4, 64]" = torch.ops.mxnorm_pass.dequantize.default(getitem_4, getitem_5, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    # mean
    detach: "f32[4, 1]" = torch.ops.aten.detach.default(getitem_6)
    # -
    mul: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy, getitem_6)
    _to_copy_1: "bf16[4, 64]" = torch.ops.aten._to_copy.default(mul, dtype=torch.bfloat16)
    mul_2: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_1, primals_2)
    # linear
    t: "bf16[64, 32]" = torch.ops.aten.t.default(primals_3)
    convert_element_type_default: "f32[32, 64]" = torch.ops.prims.convert_element_type.default(primals_3, torch.float32)
    convert_element_type_default_1: "f32[64]" = torch.ops.prims.convert_element_type.default(primals_2, torch.float32)
    mul_tensor: "f32[32, 64]" = torch.ops.aten.mul.Tensor(convert_element_type_default, convert_element_type_default_1)
    cast_default_2 = torch.ops.mxnorm_pass.cast.default(mul_tensor, 'mxfp8 e4m3fn rceil block 32')
    getitem_7: "f8e4m3fn[32, 64]" = getitem(cast_default_2, 0)
    getitem_8: "f8e8m0fnu[32, 2]" = getitem(cast_default_2, 1)
    dequantize_default_1: "bf16[32, 64]" = torch.ops.mxnorm_pass.dequantize.default(getitem_7, getitem_8, 'mxfp8 e4m3fn rceil block 32', torch.bfloat16)
    permute_default: "bf16[64, 32]" = torch.ops.aten.permute.default(dequantize_default_1, [1, 0])
    mm: "bf16[4, 32]" = torch.ops.aten.mm.default(dequantize_default_2, permute_default)
    # linear (backward)
    t_1: "bf16[32, 4]" = torch.ops.aten.t.default(tangents_1)
    mm_1: "bf16[32, 64]" = torch.ops.aten.mm.default(t_1, mul_2)
    t_2: "bf16[64, 32]" = torch.ops.aten.t.default(mm_1)
    t_3: "bf16[32, 64]" = torch.ops.aten.t.default(t)
    mm_2: "bf16[4, 64]" = torch.ops.aten.mm.default(tangents_1, t_3)
    t_4: "bf16[32, 64]" = torch.ops.aten.t.default(t_2)
    #  (backward)
    mul_4: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(mm_2, _to_copy_1)
    mul_5: "bf16[4, 64]" = torch.ops.aten.mul.Tensor(mm_2, primals_2)
    sum_1: "bf16[1, 64]" = torch.ops.aten.sum.dim_IntList(mul_4, [0], True)
    view: "bf16[64]" = torch.ops.aten.view.default(sum_1, [64])
    _to_copy_4: "f32[4, 64]" = torch.ops.aten._to_copy.default(mul_5, dtype=torch.float32, layout=torch.strided, device=cpu)
    mul_6: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_4, _to_copy)
    mul_7: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy_4, getitem_6)
    sum_2: "f32[4, 1]" = torch.ops.aten.sum.dim_IntList(mul_6, [1], True)
    # mean (backward)
    detach_2: "f32[4, 1]" = torch.ops.aten.detach.default(detach)
    pow_2: "f32[4, 64]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy, 2)
    mean_1: "f32[4, 1]" = torch.ops.aten.mean.dim(pow_2, [-1], True)
    add_2: "f32[4, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-06)
    rsqrt_1: "f32[4, 1]" = torch.ops.aten.rsqrt.default(add_2)
    neg: "f32[4, 1]" = torch.ops.aten.neg.default(detach_2)
    pow_3: "f32[4, 1]" = torch.ops.aten.pow.Tensor_Scalar(rsqrt_1, 2)
    mul_8: "f32[4, 1]" = torch.ops.aten.mul.Tensor(neg, pow_3)
    mul_9: "f32[4, 1]" = torch.ops.aten.mul.Tensor(mul_8, sum_2)
    div: "f32[4, 1]" = torch.ops.aten.div.Tensor(mul_9, 64)
    mul_10: "f32[4, 64]" = torch.ops.aten.mul.Tensor(_to_copy, div)
    #  (backward)
    add_1: "f32[4, 64]" = torch.ops.aten.add.Tensor(mul_7, mul_10)
    _to_copy_5: "bf16[4, 64]" = torch.ops.aten._to_copy.default(add_1, dtype=torch.bfloat16, layout=torch.strided, device=cpu)
    return [mm, _to_copy_5, view, t_4]
""",
        )


@some(["aot_eager"], inner=["aot_eager", "inductor"])
def test_the_exact_rms_of_orthogonal_is_computed_in_the_backward_alone(inner, monkeypatch) -> None:
    compiled: list[str] = []

    def keep_code(compiler: Callable[..., object]) -> Callable[..., object]:
        def keeping(gm: torch.fx.GraphModule, *args: object, **kwargs: object) -> object:
            compiled.append(gm.print_readable(print_output=False))
            return compiler(gm, *args, **kwargs)

        return keeping

    monkeypatch.setattr(debugging, "boxed_nop", keep_code(debugging.boxed_nop))
    monkeypatch.setattr(compile_fx, "compile_fx_inner", keep_code(compile_fx.compile_fx_inner))
    model = build_llama(layers=1)
    options = {"inner": inner, "gradient": "orthogonal"}
    ids = token_ids()
    torch.compile(model, backend="mxnorm", options=options)(ids, labels=ids).loss.backward()
    forward, backward = compiled
    # model.norm, which has no MX cast, keeps its mean of squares in the forward.
    assert forward.count("norm_cast.default(") == 2
    assert forward.count("torch.ops.aten.mean.dim") == 1
    assert backward.count("torch.ops.aten.mean.dim") == 2
