# ruff: noqa
# fmt: off
"""plain-llama-inference, decompositions: inductor."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = []


def graph(
    arg0_1: "bf16[128]",
    arg1_1: "bf16[2, 16, 128]",
    arg2_1: "bf16[128, 128]",
    arg3_1: "bf16[128, 128]",
):
    # norm
    convert_element_type_1: "f32[2, 16, 128]" = torch.ops.prims.convert_element_type.default(arg1_1, torch.float32)
    pow_1: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(convert_element_type_1, 2)
    mean_1: "f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)
    add_1: "f32[2, 16, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)
    rsqrt_1: "f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)
    mul_1: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_1, rsqrt_1)
    convert_element_type_2: "bf16[2, 16, 128]" = torch.ops.prims.convert_element_type.default(mul_1, torch.bfloat16)
    mul_2: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(arg0_1, convert_element_type_2)
    # q
    permute_1: "bf16[128, 128] (1, 128)" = torch.ops.aten.permute.default(arg2_1, [1, 0])
    view_1: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])
    mm_1: "bf16[32, 128]" = torch.ops.aten.mm.default(view_1, permute_1)
    view_2: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_1, [2, 16, 128])
    # k
    permute_2: "bf16[128, 128] (1, 128)" = torch.ops.aten.permute.default(arg3_1, [1, 0])
    view_3: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])
    mm_2: "bf16[32, 128]" = torch.ops.aten.mm.default(view_3, permute_2)
    view_4: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_2, [2, 16, 128])
    return (view_2, view_4)
