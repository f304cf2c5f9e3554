# ruff: noqa
# fmt: off
"""sm100-scaled_mm-rceil, decompositions: inductor."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = []


def graph(
    arg0_1: "cuda bf16[128]",
    arg1_1: "cuda bf16[2, 16, 128]",
    arg2_1: "cuda f8e4m3fn[128, 128]",
    arg3_1: "cuda f8e8m0fnu[32, 16]",
):
    # norm
    convert_element_type_1: "cuda f32[2, 16, 128]" = torch.ops.prims.convert_element_type.default(arg1_1, torch.float32)
    pow_1: "cuda f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(convert_element_type_1, 2)
    mean_1: "cuda f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)
    add_1: "cuda f32[2, 16, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)
    rsqrt_1: "cuda f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)
    mul_1: "cuda f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_1, rsqrt_1)
    convert_element_type_2: "cuda bf16[2, 16, 128]" = torch.ops.prims.convert_element_type.default(mul_1, torch.bfloat16)
    mul_2: "cuda bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(arg0_1, convert_element_type_2)
    # q
    view_1: "cuda bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [32, 128])
    view_2: "cuda bf16[32, 4, 32]" = torch.ops.aten.view.default(view_1, [32, 4, 32])
    abs_1: "cuda bf16[32, 4, 32]" = torch.ops.aten.abs.default(view_2)
    amax_1: "cuda bf16[32, 4]" = torch.ops.aten.amax.default(abs_1, [-1])
    unsqueeze_1: "cuda bf16[32, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_1, -1)
    convert_element_type_3: "cuda f32[32, 4, 32]" = torch.ops.prims.convert_element_type.default(view_2, torch.float32)
    convert_element_type_4: "cuda f32[32, 4, 1]" = torch.ops.prims.convert_element_type.default(unsqueeze_1, torch.float32)
    div_1: "cuda f32[32, 4, 1]" = torch.ops.aten.div.Tensor(convert_element_type_4, 448.0)
    isnan_1: "cuda b8[32, 4, 1]" = torch.ops.aten.isnan.default(div_1)
    log2_1: "cuda f32[32, 4, 1]" = torch.ops.aten.log2.default(div_1)
    ceil_1: "cuda f32[32, 4, 1]" = torch.ops.aten.ceil.default(log2_1)
    clamp_min_1: "cuda f32[32, 4, 1]" = torch.ops.aten.clamp_min.default(ceil_1, -127)
    clamp_max_1: "cuda f32[32, 4, 1]" = torch.ops.aten.clamp_max.default(clamp_min_1, 127)
    add_2: "cuda f32[32, 4, 1]" = torch.ops.aten.add.Tensor(clamp_max_1, 127)
    convert_element_type_5: "cuda u8[32, 4, 1]" = torch.ops.prims.convert_element_type.default(add_2, torch.uint8)
    scalar_tensor_1: "cuda u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cuda', index=0), dtype=torch.uint8, layout=torch.strided)
    where_1: "cuda u8[32, 4, 1]" = torch.ops.aten.where.self(isnan_1, scalar_tensor_1, convert_element_type_5)
    eq_1: "cuda b8[32, 4, 1]" = torch.ops.aten.eq.Scalar(where_1, 0)
    convert_element_type_6: "cuda f32[32, 4, 1]" = torch.ops.prims.convert_element_type.default(where_1, torch.float32)
    sub_1: "cuda f32[32, 4, 1]" = torch.ops.aten.sub.Tensor(127, convert_element_type_6)
    exp2_1: "cuda f32[32, 4, 1]" = torch.ops.aten.exp2.default(sub_1)
    scalar_tensor_2: "cuda f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cuda', index=0), dtype=torch.float32, layout=torch.strided)
    where_2: "cuda f32[32, 4, 1]" = torch.ops.aten.where.self(eq_1, scalar_tensor_2, exp2_1)
    mul_3: "cuda f32[32, 4, 32]" = torch.ops.aten.mul.Tensor(convert_element_type_3, where_2)
    clamp_min_2: "cuda f32[32, 4, 32]" = torch.ops.aten.clamp_min.default(mul_3, -448.0)
    clamp_max_2: "cuda f32[32, 4, 32]" = torch.ops.aten.clamp_max.default(clamp_min_2, 448.0)
    convert_element_type_7: "cuda f8e4m3fn[32, 4, 32]" = torch.ops.prims.convert_element_type.default(clamp_max_2, torch.float8_e4m3fn)
    view_3: "cuda f8e4m3fn[32, 128]" = torch.ops.aten.view.default(convert_element_type_7, [32, 128])
    view_4: "cuda f8e8m0fnu[32, 4, 1]" = torch.ops.aten.view.dtype(where_1, torch.float8_e8m0fnu)
    alias_1: "cuda f8e8m0fnu[32, 4, 1]" = torch.ops.aten.alias.default(view_4)
    squeeze_1: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.squeeze.dim(alias_1, -1)
    view_5: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.view.default(squeeze_1, [32, 4])
    full_1: "cuda f8e8m0fnu[128, 4]" = torch.ops.aten.full.default([128, 4], 0, device=device(type='cuda', index=0), dtype=torch.float8_e8m0fnu, layout=torch.strided, pin_memory=False)
    slice_1: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.slice.Tensor(full_1, 0, 0, 32)
    copy_1: "cuda f8e8m0fnu[32, 4]" = torch.ops.aten.copy.default(slice_1, view_5)
    slice_scatter_1: "cuda f8e8m0fnu[128, 4]" = torch.ops.aten.slice_scatter.default(full_1, copy_1, 0, 0, 32)
    view_6: "cuda f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(slice_scatter_1, [1, 128, 1, 4])
    permute_1: "cuda f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_6, [0, 2, 1, 3])
    view_7: "cuda f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_1, [-1, 4, 32, 4])
    permute_2: "cuda f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_7, [0, 2, 1, 3])
    clone_1: "cuda f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_2, memory_format=torch.contiguous_format)
    view_8: "cuda f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_1, [1, 32, 16])
    view_9: "cuda f8e8m0fnu[512]" = torch.ops.aten.view.default(view_8, [512])
    view_10: "cuda f8e8m0fnu[32, 16]" = torch.ops.aten.view.default(view_9, [32, 16])
    permute_3: "cuda f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(arg2_1, [1, 0])
    _scaled_mm_v2_1: "cuda bf16[32, 128]" = torch.ops.aten._scaled_mm_v2.default(view_3, permute_3, [view_10], [3], [1], [arg3_1], [3], [1], None, torch.bfloat16)
    return (_scaled_mm_v2_1,)
