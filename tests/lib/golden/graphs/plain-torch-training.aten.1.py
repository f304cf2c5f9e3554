# ruff: noqa
# fmt: off
"""plain-torch-training, decompositions: aten."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = []


def graph(
    primals_1: "bf16[128]",
    primals_2: "bf16[2, 16, 128]",
    primals_3: "bf16[128, 128]",
    primals_4: "bf16[128, 128]",
    tangents_1: "bf16[2, 16, 128]",
    tangents_2: "bf16[2, 16, 128]",
):
    # norm
    _to_copy_1: "f32[2, 16, 128]" = torch.ops.aten._to_copy.default(primals_2, dtype=torch.float32)  # 1
    pow_1: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 2)  # 2
    mean_1: "f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [2], True)  # 3
    add_1: "f32[2, 16, 1]" = torch.ops.aten.add.Scalar(mean_1, 9.999999747378752e-06)  # 4
    rsqrt_1: "f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)  # 5
    detach_1: "f32[2, 16, 1]" = torch.ops.aten.detach.default(rsqrt_1)  # 5
    mul_1: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_1, rsqrt_1)  # 6
    mul_2: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(mul_1, primals_1)  # 7
    _to_copy_2: "bf16[2, 16, 128]" = torch.ops.aten._to_copy.default(mul_2, device=device(type='cpu'), dtype=torch.bfloat16, layout=torch.strided)  # 8
    # q
    t_1: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(primals_3)  # 9
    view_1: "bf16[32, 128]" = torch.ops.aten.view.default(_to_copy_2, [32, 128])  # 10
    mm_1: "bf16[32, 128]" = torch.ops.aten.mm.default(view_1, t_1)  # 11
    _unsafe_view_1: "bf16[2, 16, 128]" = torch.ops.aten._unsafe_view.default(mm_1, [2, 16, 128])  # 12
    # k
    t_2: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(primals_4)  # 13
    view_2: "bf16[32, 128]" = torch.ops.aten.view.default(_to_copy_2, [32, 128])  # 14
    mm_2: "bf16[32, 128]" = torch.ops.aten.mm.default(view_2, t_2)  # 15
    _unsafe_view_2: "bf16[2, 16, 128]" = torch.ops.aten._unsafe_view.default(mm_2, [2, 16, 128])  # 16
    # k (backward)
    view_3: "bf16[32, 128]" = torch.ops.aten.view.default(tangents_2, [32, 128])  # 16
    t_3: "bf16[128, 32] (1, 128)" = torch.ops.aten.t.default(view_3)  # 15
    mm_3: "bf16[128, 128]" = torch.ops.aten.mm.default(t_3, view_2)  # 15
    t_4: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(mm_3)  # 15
    t_5: "bf16[128, 128]" = torch.ops.aten.t.default(t_2)  # 15
    mm_4: "bf16[32, 128]" = torch.ops.aten.mm.default(view_3, t_5)  # 15
    view_4: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_4, [2, 16, 128])  # 14
    t_6: "bf16[128, 128]" = torch.ops.aten.t.default(t_4)  # 13
    # q (backward)
    view_5: "bf16[32, 128]" = torch.ops.aten.view.default(tangents_1, [32, 128])  # 12
    t_7: "bf16[128, 32] (1, 128)" = torch.ops.aten.t.default(view_5)  # 11
    mm_5: "bf16[128, 128]" = torch.ops.aten.mm.default(t_7, view_1)  # 11
    t_8: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(mm_5)  # 11
    t_9: "bf16[128, 128]" = torch.ops.aten.t.default(t_1)  # 11
    mm_6: "bf16[32, 128]" = torch.ops.aten.mm.default(view_5, t_9)  # 11
    view_6: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_6, [2, 16, 128])  # 10
    # - (backward)
    add_2: "bf16[2, 16, 128]" = torch.ops.aten.add.Tensor(view_4, view_6)  # 17
    # q (backward)
    t_10: "bf16[128, 128]" = torch.ops.aten.t.default(t_8)  # 9
    # norm (backward)
    _to_copy_3: "f32[2, 16, 128]" = torch.ops.aten._to_copy.default(add_2, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 8
    mul_3: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_3, mul_1)  # 7
    mul_4: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_3, primals_1)  # 7
    sum_1: "f32[1, 1, 128]" = torch.ops.aten.sum.dim_IntList(mul_3, [0, 1], True)  # 7
    view_7: "f32[128]" = torch.ops.aten.view.default(sum_1, [128])  # 7
    _to_copy_4: "bf16[128]" = torch.ops.aten._to_copy.default(view_7, dtype=torch.bfloat16)  # 7
    mul_5: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(mul_4, _to_copy_1)  # 6
    mul_6: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(mul_4, rsqrt_1)  # 6
    sum_2: "f32[2, 16, 1]" = torch.ops.aten.sum.dim_IntList(mul_5, [2], True)  # 6
    detach_2: "f32[2, 16, 1]" = torch.ops.aten.detach.default(detach_1)  # 5
    pow_2: "f32[2, 16, 1]" = torch.ops.aten.pow.Tensor_Scalar(detach_2, 3)  # 5
    mul_7: "f32[2, 16, 1]" = torch.ops.aten.mul.Scalar(sum_2, -0.5)  # 5
    mul_8: "f32[2, 16, 1]" = torch.ops.aten.mul.Tensor(mul_7, pow_2)  # 5
    expand_1: "f32[2, 16, 128] (16, 1, 0)" = torch.ops.aten.expand.default(mul_8, [2, 16, 128])  # 3
    div_1: "f32[2, 16, 128]" = torch.ops.aten.div.Scalar(expand_1, 128)  # 3
    pow_3: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 1.0)  # 2
    mul_9: "f32[2, 16, 128]" = torch.ops.aten.mul.Scalar(pow_3, 2.0)  # 2
    mul_10: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(div_1, mul_9)  # 2
    # - (backward)
    add_3: "f32[2, 16, 128]" = torch.ops.aten.add.Tensor(mul_6, mul_10)  # 17
    # norm (backward)
    _to_copy_5: "bf16[2, 16, 128]" = torch.ops.aten._to_copy.default(add_3, device=device(type='cpu'), dtype=torch.bfloat16, layout=torch.strided)  # 1
    return [_unsafe_view_1, _unsafe_view_2, _to_copy_4, _to_copy_5, t_10, t_6]
