# ruff: noqa
# fmt: off
"""plain-llama-training, decompositions: inductor."""
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
    convert_element_type_1: "f32[2, 16, 128]" = torch.ops.prims.convert_element_type.default(primals_2, torch.float32)  # 1
    pow_1: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(convert_element_type_1, 2)  # 2
    mean_1: "f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)  # 3
    add_1: "f32[2, 16, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)  # 4
    rsqrt_1: "f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)  # 5
    alias_1: "f32[2, 16, 1]" = torch.ops.aten.alias.default(rsqrt_1)  # 5
    mul_1: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_1, rsqrt_1)  # 6
    convert_element_type_2: "bf16[2, 16, 128]" = torch.ops.prims.convert_element_type.default(mul_1, torch.bfloat16)  # 7
    mul_2: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(primals_1, convert_element_type_2)  # 8
    # q
    permute_1: "bf16[128, 128] (1, 128)" = torch.ops.aten.permute.default(primals_3, [1, 0])  # 9
    view_1: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])  # 10
    mm_1: "bf16[32, 128]" = torch.ops.aten.mm.default(view_1, permute_1)  # 11
    view_2: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_1, [2, 16, 128])  # 12
    # k
    permute_2: "bf16[128, 128] (1, 128)" = torch.ops.aten.permute.default(primals_4, [1, 0])  # 13
    view_3: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])  # 14
    mm_2: "bf16[32, 128]" = torch.ops.aten.mm.default(view_3, permute_2)  # 15
    view_4: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_2, [2, 16, 128])  # 16
    # k (backward)
    view_5: "bf16[32, 128]" = torch.ops.aten.view.default(tangents_2, [32, 128])  # 16
    permute_3: "bf16[128, 32] (1, 128)" = torch.ops.aten.permute.default(view_5, [1, 0])  # 15
    mm_3: "bf16[128, 128]" = torch.ops.aten.mm.default(permute_3, view_3)  # 15
    permute_4: "bf16[128, 128] (1, 128)" = torch.ops.aten.permute.default(mm_3, [1, 0])  # 15
    permute_5: "bf16[128, 128]" = torch.ops.aten.permute.default(permute_2, [1, 0])  # 15
    mm_4: "bf16[32, 128]" = torch.ops.aten.mm.default(view_5, permute_5)  # 15
    view_6: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_4, [2, 16, 128])  # 14
    permute_6: "bf16[128, 128]" = torch.ops.aten.permute.default(permute_4, [1, 0])  # 13
    # q (backward)
    view_7: "bf16[32, 128]" = torch.ops.aten.view.default(tangents_1, [32, 128])  # 12
    permute_7: "bf16[128, 32] (1, 128)" = torch.ops.aten.permute.default(view_7, [1, 0])  # 11
    mm_5: "bf16[128, 128]" = torch.ops.aten.mm.default(permute_7, view_1)  # 11
    permute_8: "bf16[128, 128] (1, 128)" = torch.ops.aten.permute.default(mm_5, [1, 0])  # 11
    permute_9: "bf16[128, 128]" = torch.ops.aten.permute.default(permute_1, [1, 0])  # 11
    mm_6: "bf16[32, 128]" = torch.ops.aten.mm.default(view_7, permute_9)  # 11
    view_8: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_6, [2, 16, 128])  # 10
    # - (backward)
    add_2: "bf16[2, 16, 128]" = torch.ops.aten.add.Tensor(view_6, view_8)  # 17
    # q (backward)
    permute_10: "bf16[128, 128]" = torch.ops.aten.permute.default(permute_8, [1, 0])  # 9
    # norm (backward)
    mul_3: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(add_2, primals_1)  # 8
    mul_4: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(add_2, convert_element_type_2)  # 8
    sum_1: "bf16[1, 1, 128]" = torch.ops.aten.sum.dim_IntList(mul_4, [0, 1], True)  # 8
    view_9: "bf16[128]" = torch.ops.aten.view.default(sum_1, [128])  # 8
    convert_element_type_3: "f32[2, 16, 128]" = torch.ops.prims.convert_element_type.default(mul_3, torch.float32)  # 7
    mul_5: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_3, convert_element_type_1)  # 6
    mul_6: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_3, rsqrt_1)  # 6
    sum_2: "f32[2, 16, 1]" = torch.ops.aten.sum.dim_IntList(mul_5, [2], True)  # 6
    alias_2: "f32[2, 16, 1]" = torch.ops.aten.alias.default(alias_1)  # 5
    pow_2: "f32[2, 16, 1]" = torch.ops.aten.pow.Tensor_Scalar(alias_2, 3)  # 5
    mul_7: "f32[2, 16, 1]" = torch.ops.aten.mul.Scalar(sum_2, -0.5)  # 5
    mul_8: "f32[2, 16, 1]" = torch.ops.aten.mul.Tensor(mul_7, pow_2)  # 5
    expand_1: "f32[2, 16, 128] (16, 1, 0)" = torch.ops.aten.expand.default(mul_8, [2, 16, 128])  # 3
    div_1: "f32[2, 16, 128]" = torch.ops.aten.div.Scalar(expand_1, 128)  # 3
    pow_3: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(convert_element_type_1, 1.0)  # 2
    mul_9: "f32[2, 16, 128]" = torch.ops.aten.mul.Scalar(pow_3, 2.0)  # 2
    mul_10: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(div_1, mul_9)  # 2
    # - (backward)
    add_3: "f32[2, 16, 128]" = torch.ops.aten.add.Tensor(mul_6, mul_10)  # 17
    # norm (backward)
    convert_element_type_4: "bf16[2, 16, 128]" = torch.ops.prims.convert_element_type.default(add_3, torch.bfloat16)  # 1
    return [view_2, view_4, view_9, convert_element_type_4, permute_10, permute_6]
