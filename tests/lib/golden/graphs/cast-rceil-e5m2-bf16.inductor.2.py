# ruff: noqa
# fmt: off
"""cast-rceil-e5m2-bf16, decompositions: inductor."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = []


def graph(
    arg0_1: "bf16[128]",
    arg1_1: "bf16[2, 16, 128]",
    arg2_1: "bf16[64, 128]",
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
    view_1: "bf16[2, 16, 4, 32]" = torch.ops.aten.view.default(mul_2, [2, 16, 4, 32])
    abs_1: "bf16[2, 16, 4, 32]" = torch.ops.aten.abs.default(view_1)
    amax_1: "bf16[2, 16, 4]" = torch.ops.aten.amax.default(abs_1, [-1])
    unsqueeze_1: "bf16[2, 16, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_1, -1)
    convert_element_type_3: "f32[2, 16, 4, 32]" = torch.ops.prims.convert_element_type.default(view_1, torch.float32)
    convert_element_type_4: "f32[2, 16, 4, 1]" = torch.ops.prims.convert_element_type.default(unsqueeze_1, torch.float32)
    div_1: "f32[2, 16, 4, 1]" = torch.ops.aten.div.Tensor(convert_element_type_4, 57344.0)
    isnan_1: "b8[2, 16, 4, 1]" = torch.ops.aten.isnan.default(div_1)
    log2_1: "f32[2, 16, 4, 1]" = torch.ops.aten.log2.default(div_1)
    ceil_1: "f32[2, 16, 4, 1]" = torch.ops.aten.ceil.default(log2_1)
    clamp_min_1: "f32[2, 16, 4, 1]" = torch.ops.aten.clamp_min.default(ceil_1, -127)
    clamp_max_1: "f32[2, 16, 4, 1]" = torch.ops.aten.clamp_max.default(clamp_min_1, 127)
    add_2: "f32[2, 16, 4, 1]" = torch.ops.aten.add.Tensor(clamp_max_1, 127)
    convert_element_type_5: "u8[2, 16, 4, 1]" = torch.ops.prims.convert_element_type.default(add_2, torch.uint8)
    scalar_tensor_1: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)
    where_1: "u8[2, 16, 4, 1]" = torch.ops.aten.where.self(isnan_1, scalar_tensor_1, convert_element_type_5)
    eq_1: "b8[2, 16, 4, 1]" = torch.ops.aten.eq.Scalar(where_1, 0)
    convert_element_type_6: "f32[2, 16, 4, 1]" = torch.ops.prims.convert_element_type.default(where_1, torch.float32)
    sub_1: "f32[2, 16, 4, 1]" = torch.ops.aten.sub.Tensor(127, convert_element_type_6)
    exp2_1: "f32[2, 16, 4, 1]" = torch.ops.aten.exp2.default(sub_1)
    scalar_tensor_2: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)
    where_2: "f32[2, 16, 4, 1]" = torch.ops.aten.where.self(eq_1, scalar_tensor_2, exp2_1)
    mul_3: "f32[2, 16, 4, 32]" = torch.ops.aten.mul.Tensor(convert_element_type_3, where_2)
    clamp_min_2: "f32[2, 16, 4, 32]" = torch.ops.aten.clamp_min.default(mul_3, -57344.0)
    clamp_max_2: "f32[2, 16, 4, 32]" = torch.ops.aten.clamp_max.default(clamp_min_2, 57344.0)
    convert_element_type_7: "f8e5m2[2, 16, 4, 32]" = torch.ops.prims.convert_element_type.default(clamp_max_2, torch.float8_e5m2)
    view_2: "f8e5m2[2, 16, 128]" = torch.ops.aten.view.default(convert_element_type_7, [2, 16, 128])
    view_3: "f8e8m0fnu[2, 16, 4, 1]" = torch.ops.aten.view.dtype(where_1, torch.float8_e8m0fnu)
    alias_1: "f8e8m0fnu[2, 16, 4, 1]" = torch.ops.aten.alias.default(view_3)
    squeeze_1: "f8e8m0fnu[2, 16, 4]" = torch.ops.aten.squeeze.dim(alias_1, -1)
    convert_element_type_8: "bf16[2, 16, 128]" = torch.ops.prims.convert_element_type.default(view_2, torch.bfloat16)
    view_4: "bf16[128, 32]" = torch.ops.aten.view.default(convert_element_type_8, [-1, 32])
    view_5: "u8[2, 16, 4]" = torch.ops.aten.view.dtype(squeeze_1, torch.uint8)
    alias_2: "u8[2, 16, 4]" = torch.ops.aten.alias.default(view_5)
    convert_element_type_9: "i16[2, 16, 4]" = torch.ops.prims.convert_element_type.default(alias_2, torch.int16)
    sub_2: "i16[2, 16, 4]" = torch.ops.aten.sub.Tensor(convert_element_type_9, 127)
    full_1: "f32[2, 16, 4]" = torch.ops.aten.full.default([2, 16, 4], 2.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided, pin_memory=False)
    pow_2: "f32[2, 16, 4]" = torch.ops.aten.pow.Tensor_Tensor(full_1, sub_2)
    ne_1: "b8[2, 16, 4]" = torch.ops.aten.ne.Scalar(alias_2, 255)
    scalar_tensor_3: "f32[]" = torch.ops.aten.scalar_tensor.default(nan, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)
    where_3: "f32[2, 16, 4]" = torch.ops.aten.where.self(ne_1, pow_2, scalar_tensor_3)
    view_6: "f32[128, 1]" = torch.ops.aten.view.default(where_3, [-1, 1])
    convert_element_type_10: "bf16[128, 1]" = torch.ops.prims.convert_element_type.default(view_6, torch.bfloat16)
    mul_4: "bf16[128, 32]" = torch.ops.aten.mul.Tensor(view_4, convert_element_type_10)
    view_7: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mul_4, [2, 16, 128])
    permute_1: "bf16[128, 64] (1, 128)" = torch.ops.aten.permute.default(arg2_1, [1, 0])
    view_8: "bf16[32, 128]" = torch.ops.aten.view.default(view_7, [32, 128])
    mm_1: "bf16[32, 64]" = torch.ops.aten.mm.default(view_8, permute_1)
    view_9: "bf16[2, 16, 64]" = torch.ops.aten.view.default(mm_1, [2, 16, 64])
    return (view_9,)
