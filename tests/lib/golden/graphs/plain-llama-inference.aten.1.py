# ruff: noqa
# fmt: off
"""plain-llama-inference, decompositions: aten."""
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
    _to_copy_1: "f32[2, 16, 128]" = torch.ops.aten._to_copy.default(arg1_1, dtype=torch.float32)
    pow_1: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 2)
    mean_1: "f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)
    add_1: "f32[2, 16, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)
    rsqrt_1: "f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)
    mul_1: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_1, rsqrt_1)
    _to_copy_2: "bf16[2, 16, 128]" = torch.ops.aten._to_copy.default(mul_1, dtype=torch.bfloat16)
    mul_2: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(arg0_1, _to_copy_2)
    # q
    t_1: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(arg2_1)
    view_1: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])
    mm_1: "bf16[32, 128]" = torch.ops.aten.mm.default(view_1, t_1)
    _unsafe_view_1: "bf16[2, 16, 128]" = torch.ops.aten._unsafe_view.default(mm_1, [2, 16, 128])
    # k
    t_2: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(arg3_1)
    view_2: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])
    mm_2: "bf16[32, 128]" = torch.ops.aten.mm.default(view_2, t_2)
    _unsafe_view_2: "bf16[2, 16, 128]" = torch.ops.aten._unsafe_view.default(mm_2, [2, 16, 128])
    return (_unsafe_view_1, _unsafe_view_2)
