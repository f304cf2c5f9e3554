# ruff: noqa
# fmt: off
"""sm100-export-rceil-triton, decompositions: aten."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = ['torchao::triton_to_mxfp8_dim0(Tensor x, SymInt inner_block_size=32, str scaling_mode="rceil") -> (Tensor, Tensor)']


def graph(
    p_norm_weight: "cuda bf16[128]",
    b_q_values: "cuda f8e4m3fn[128, 128]",
    b_q_scales: "cuda f8e8m0fnu[512]",
    x: "cuda bf16[2, 16, 128]",
):
    # norm
    _to_copy_1: "cuda f32[2, 16, 128]" = torch.ops.aten._to_copy.default(x, dtype=torch.float32)
    pow_1: "cuda f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 2)
    mean_1: "cuda f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)
    add_1: "cuda f32[2, 16, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)
    rsqrt_1: "cuda f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)
    mul_1: "cuda f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_1, rsqrt_1)
    _to_copy_2: "cuda bf16[2, 16, 128]" = torch.ops.aten._to_copy.default(mul_1, dtype=torch.bfloat16)
    mul_2: "cuda bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(p_norm_weight, _to_copy_2)
    # q
    view_1: "cuda bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])
    triton_to_mxfp8_dim0_1: "cuda f8e4m3fn[32, 128]; cuda f8e8m0fnu[32, 4]" = torch.ops.torchao.triton_to_mxfp8_dim0.default(view_1)
    getitem_1: "cuda f8e4m3fn[32, 128]" = operator.getitem(triton_to_mxfp8_dim0_1, 0)
    getitem_2: "cuda f8e8m0fnu[32, 4]" = operator.getitem(triton_to_mxfp8_dim0_1, 1)
    t_1: "cuda f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(b_q_values)
    zeros_1: "cuda f8e8m0fnu[128, 4]" = torch.ops.aten.zeros.default([128, 4], device=device(type='cuda', index=0), dtype=torch.float8_e8m0fnu, pin_memory=False)
    slice_1: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.slice.Tensor(zeros_1, 0, 0, 32)
    copy_1: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.copy.default(slice_1, getitem_2)
    slice_scatter_1: "cuda f8e8m0fnu[128, 4]" = torch.ops.aten.slice_scatter.default(zeros_1, copy_1, 0, 0, 32)
    view_2: "cuda f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(slice_scatter_1, [1, 128, 1, 4])
    permute_1: "cuda f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_2, [0, 2, 1, 3])
    view_3: "cuda f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_1, [-1, 4, 32, 4])
    transpose_1: "cuda f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_3, 1, 2)
    clone_1: "cuda f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_1, memory_format=torch.contiguous_format)
    _unsafe_view_1: "cuda f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_1, [1, 32, 16])
    view_4: "cuda f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_1, [512])
    _scaled_mm_1: "cuda bf16[32, 128]" = torch.ops.aten._scaled_mm.default(getitem_1, t_1, view_4, b_q_scales, None, None, torch.bfloat16)
    return (_scaled_mm_1,)
