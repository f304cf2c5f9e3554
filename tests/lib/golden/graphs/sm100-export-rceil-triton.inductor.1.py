# ruff: noqa
# fmt: off
"""sm100-export-rceil-triton, decompositions: inductor."""
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
    convert_element_type_1: "cuda f32[2, 16, 128]" = torch.ops.prims.convert_element_type.default(x, torch.float32)
    pow_1: "cuda f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(convert_element_type_1, 2)
    mean_1: "cuda f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)
    add_1: "cuda f32[2, 16, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)
    rsqrt_1: "cuda f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)
    mul_1: "cuda f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_1, rsqrt_1)
    convert_element_type_2: "cuda bf16[2, 16, 128]" = torch.ops.prims.convert_element_type.default(mul_1, torch.bfloat16)
    mul_2: "cuda bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(p_norm_weight, convert_element_type_2)
    # q
    view_1: "cuda bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])
    triton_to_mxfp8_dim0_1: "cuda f8e4m3fn[32, 128]; cuda f8e8m0fnu[32, 4]" = torch.ops.torchao.triton_to_mxfp8_dim0.default(view_1)
    getitem_1: "cuda f8e4m3fn[32, 128]" = operator.getitem(triton_to_mxfp8_dim0_1, 0)
    getitem_2: "cuda f8e8m0fnu[32, 4]" = operator.getitem(triton_to_mxfp8_dim0_1, 1)
    permute_1: "cuda f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(b_q_values, [1, 0])
    full_1: "cuda f8e8m0fnu[128, 4]" = torch.ops.aten.full.default([128, 4], 0, device=device(type='cuda', index=0), dtype=torch.float8_e8m0fnu, layout=torch.strided, pin_memory=False)
    slice_1: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.slice.Tensor(full_1, 0, 0, 32)
    copy_1: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.copy.default(slice_1, getitem_2)
    slice_scatter_1: "cuda f8e8m0fnu[128, 4]" = torch.ops.aten.slice_scatter.default(full_1, copy_1, 0, 0, 32)
    view_2: "cuda f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(slice_scatter_1, [1, 128, 1, 4])
    permute_2: "cuda f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_2, [0, 2, 1, 3])
    view_3: "cuda f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_2, [-1, 4, 32, 4])
    permute_3: "cuda f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_3, [0, 2, 1, 3])
    clone_1: "cuda f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_3, memory_format=torch.contiguous_format)
    view_4: "cuda f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_1, [1, 32, 16])
    view_5: "cuda f8e8m0fnu[512]" = torch.ops.aten.view.default(view_4, [512])
    _scaled_mm_1: "cuda bf16[32, 128]" = torch.ops.aten._scaled_mm.default(getitem_1, permute_1, view_5, b_q_scales, None, None, torch.bfloat16)
    return (_scaled_mm_1,)
