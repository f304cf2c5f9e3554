# ruff: noqa
# fmt: off
"""training-rceil, decompositions: aten."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = []


def graph(
    primals_1: "bf16[128]",
    primals_2: "bf16[2, 16, 128]",
    primals_3: "bf16[128, 128]",
    tangents_1: "bf16[2, 16, 128]",
):
    # norm
    _to_copy_1: "f32[2, 16, 128]" = torch.ops.aten._to_copy.default(primals_2, dtype=torch.float32)  # 1
    pow_1: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 2)  # 2
    mean_1: "f32[2, 16, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)  # 3
    add_1: "f32[2, 16, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)  # 4
    rsqrt_1: "f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add_1)  # 5
    detach_1: "f32[2, 16, 1]" = torch.ops.aten.detach.default(rsqrt_1)  # 5
    mul_1: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_1, rsqrt_1)  # 6
    _to_copy_2: "bf16[2, 16, 128]" = torch.ops.aten._to_copy.default(mul_1, dtype=torch.bfloat16)  # 7
    mul_2: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(primals_1, _to_copy_2)  # 8
    # q
    view_1: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [-1, 128])  # 9
    view_2: "bf16[32, 4, 32]" = torch.ops.aten.view.default(view_1, [32, 4, 32])  # 9
    abs_1: "bf16[32, 4, 32]" = torch.ops.aten.abs.default(view_2)  # 9
    amax_1: "bf16[32, 4]" = torch.ops.aten.amax.default(abs_1, [-1])  # 9
    unsqueeze_1: "bf16[32, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_1, -1)  # 9
    _to_copy_3: "f32[32, 4, 32]" = torch.ops.aten._to_copy.default(view_2, dtype=torch.float32)  # 9
    _to_copy_4: "f32[32, 4, 1]" = torch.ops.aten._to_copy.default(unsqueeze_1, dtype=torch.float32)  # 9
    div_1: "f32[32, 4, 1]" = torch.ops.aten.div.Tensor(_to_copy_4, 448.0)  # 9
    isnan_1: "b8[32, 4, 1]" = torch.ops.aten.isnan.default(div_1)  # 9
    log2_1: "f32[32, 4, 1]" = torch.ops.aten.log2.default(div_1)  # 9
    ceil_1: "f32[32, 4, 1]" = torch.ops.aten.ceil.default(log2_1)  # 9
    clamp_1: "f32[32, 4, 1]" = torch.ops.aten.clamp.default(ceil_1, -127, 127)  # 9
    add_2: "f32[32, 4, 1]" = torch.ops.aten.add.Tensor(clamp_1, 127)  # 9
    _to_copy_5: "u8[32, 4, 1]" = torch.ops.aten._to_copy.default(add_2, dtype=torch.uint8)  # 9
    scalar_tensor_1: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_1: "u8[32, 4, 1]" = torch.ops.aten.where.self(isnan_1, scalar_tensor_1, _to_copy_5)  # 9
    eq_1: "b8[32, 4, 1]" = torch.ops.aten.eq.Scalar(where_1, 0)  # 9
    _to_copy_6: "f32[32, 4, 1]" = torch.ops.aten._to_copy.default(where_1, dtype=torch.float32)  # 9
    rsub_1: "f32[32, 4, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_6, 127)  # 9
    exp2_1: "f32[32, 4, 1]" = torch.ops.aten.exp2.default(rsub_1)  # 9
    scalar_tensor_2: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_2: "f32[32, 4, 1]" = torch.ops.aten.where.self(eq_1, scalar_tensor_2, exp2_1)  # 9
    mul_3: "f32[32, 4, 32]" = torch.ops.aten.mul.Tensor(_to_copy_3, where_2)  # 9
    clamp_2: "f32[32, 4, 32]" = torch.ops.aten.clamp.default(mul_3, -448.0, 448.0)  # 9
    _to_copy_7: "f8e4m3fn[32, 4, 32]" = torch.ops.aten._to_copy.default(clamp_2, dtype=torch.float8_e4m3fn)  # 9
    view_3: "f8e4m3fn[32, 128]" = torch.ops.aten.view.default(_to_copy_7, [32, 128])  # 9
    view_4: "f8e8m0fnu[32, 4, 1]" = torch.ops.aten.view.dtype(where_1, torch.float8_e8m0fnu)  # 9
    detach_2: "f8e8m0fnu[32, 4, 1]" = torch.ops.aten.detach.default(view_4)  # 9
    squeeze_1: "f8e8m0fnu[32, 4]" = torch.ops.aten.squeeze.dim(detach_2, -1)  # 9
    view_5: "bf16[128, 4, 32]" = torch.ops.aten.view.default(primals_3, [128, 4, 32])  # 9
    abs_2: "bf16[128, 4, 32]" = torch.ops.aten.abs.default(view_5)  # 9
    amax_2: "bf16[128, 4]" = torch.ops.aten.amax.default(abs_2, [-1])  # 9
    unsqueeze_2: "bf16[128, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_2, -1)  # 9
    _to_copy_8: "f32[128, 4, 32]" = torch.ops.aten._to_copy.default(view_5, dtype=torch.float32)  # 9
    _to_copy_9: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(unsqueeze_2, dtype=torch.float32)  # 9
    div_2: "f32[128, 4, 1]" = torch.ops.aten.div.Tensor(_to_copy_9, 448.0)  # 9
    isnan_2: "b8[128, 4, 1]" = torch.ops.aten.isnan.default(div_2)  # 9
    log2_2: "f32[128, 4, 1]" = torch.ops.aten.log2.default(div_2)  # 9
    ceil_2: "f32[128, 4, 1]" = torch.ops.aten.ceil.default(log2_2)  # 9
    clamp_3: "f32[128, 4, 1]" = torch.ops.aten.clamp.default(ceil_2, -127, 127)  # 9
    add_3: "f32[128, 4, 1]" = torch.ops.aten.add.Tensor(clamp_3, 127)  # 9
    _to_copy_10: "u8[128, 4, 1]" = torch.ops.aten._to_copy.default(add_3, dtype=torch.uint8)  # 9
    scalar_tensor_3: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_3: "u8[128, 4, 1]" = torch.ops.aten.where.self(isnan_2, scalar_tensor_3, _to_copy_10)  # 9
    eq_2: "b8[128, 4, 1]" = torch.ops.aten.eq.Scalar(where_3, 0)  # 9
    _to_copy_11: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(where_3, dtype=torch.float32)  # 9
    rsub_2: "f32[128, 4, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_11, 127)  # 9
    exp2_2: "f32[128, 4, 1]" = torch.ops.aten.exp2.default(rsub_2)  # 9
    scalar_tensor_4: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_4: "f32[128, 4, 1]" = torch.ops.aten.where.self(eq_2, scalar_tensor_4, exp2_2)  # 9
    mul_4: "f32[128, 4, 32]" = torch.ops.aten.mul.Tensor(_to_copy_8, where_4)  # 9
    clamp_4: "f32[128, 4, 32]" = torch.ops.aten.clamp.default(mul_4, -448.0, 448.0)  # 9
    _to_copy_12: "f8e4m3fn[128, 4, 32]" = torch.ops.aten._to_copy.default(clamp_4, dtype=torch.float8_e4m3fn)  # 9
    view_6: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(_to_copy_12, [128, 128])  # 9
    view_7: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(where_3, torch.float8_e8m0fnu)  # 9
    detach_3: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.detach.default(view_7)  # 9
    squeeze_2: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(detach_3, -1)  # 9
    t_1: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(view_6)  # 9
    t_2: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.t.default(squeeze_2)  # 9
    _to_copy_13: "bf16[32, 128]" = torch.ops.aten._to_copy.default(view_3, dtype=torch.bfloat16)  # 9
    view_8: "bf16[128, 32]" = torch.ops.aten.view.default(_to_copy_13, [-1, 32])  # 9
    view_9: "u8[32, 4]" = torch.ops.aten.view.dtype(squeeze_1, torch.uint8)  # 9
    _to_copy_14: "i16[32, 4]" = torch.ops.aten._to_copy.default(view_9, dtype=torch.int16)  # 9
    sub_1: "i16[32, 4]" = torch.ops.aten.sub.Tensor(_to_copy_14, 127)  # 9
    full_like_1: "f32[32, 4]" = torch.ops.aten.full_like.default(sub_1, 2.0, dtype=torch.float32, pin_memory=False)  # 9
    pow_2: "f32[32, 4]" = torch.ops.aten.pow.Tensor_Tensor(full_like_1, sub_1)  # 9
    ne_1: "b8[32, 4]" = torch.ops.aten.ne.Scalar(view_9, 255)  # 9
    scalar_tensor_5: "f32[]" = torch.ops.aten.scalar_tensor.default(nan, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_5: "f32[32, 4]" = torch.ops.aten.where.self(ne_1, pow_2, scalar_tensor_5)  # 9
    view_10: "f32[128, 1]" = torch.ops.aten.view.default(where_5, [-1, 1])  # 9
    _to_copy_15: "bf16[128, 1]" = torch.ops.aten._to_copy.default(view_10, dtype=torch.bfloat16)  # 9
    mul_5: "bf16[128, 32]" = torch.ops.aten.mul.Tensor(view_8, _to_copy_15)  # 9
    view_11: "bf16[32, 128]" = torch.ops.aten.view.default(mul_5, [32, 128])  # 9
    t_3: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(t_1)  # 9
    t_4: "f8e8m0fnu[128, 4]" = torch.ops.aten.t.default(t_2)  # 9
    _to_copy_16: "bf16[128, 128]" = torch.ops.aten._to_copy.default(t_3, dtype=torch.bfloat16)  # 9
    view_12: "bf16[512, 32]" = torch.ops.aten.view.default(_to_copy_16, [-1, 32])  # 9
    view_13: "u8[128, 4]" = torch.ops.aten.view.dtype(t_4, torch.uint8)  # 9
    _to_copy_17: "i16[128, 4]" = torch.ops.aten._to_copy.default(view_13, dtype=torch.int16)  # 9
    sub_2: "i16[128, 4]" = torch.ops.aten.sub.Tensor(_to_copy_17, 127)  # 9
    full_like_2: "f32[128, 4]" = torch.ops.aten.full_like.default(sub_2, 2.0, dtype=torch.float32, pin_memory=False)  # 9
    pow_3: "f32[128, 4]" = torch.ops.aten.pow.Tensor_Tensor(full_like_2, sub_2)  # 9
    ne_2: "b8[128, 4]" = torch.ops.aten.ne.Scalar(view_13, 255)  # 9
    scalar_tensor_6: "f32[]" = torch.ops.aten.scalar_tensor.default(nan, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_6: "f32[128, 4]" = torch.ops.aten.where.self(ne_2, pow_3, scalar_tensor_6)  # 9
    view_14: "f32[512, 1]" = torch.ops.aten.view.default(where_6, [-1, 1])  # 9
    _to_copy_18: "bf16[512, 1]" = torch.ops.aten._to_copy.default(view_14, dtype=torch.bfloat16)  # 9
    mul_6: "bf16[512, 32]" = torch.ops.aten.mul.Tensor(view_12, _to_copy_18)  # 9
    view_15: "bf16[128, 128]" = torch.ops.aten.view.default(mul_6, [128, 128])  # 9
    t_5: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(view_15)  # 9
    mm_1: "bf16[32, 128]" = torch.ops.aten.mm.default(view_11, t_5)  # 9
    view_16: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_1, [2, 16, 128])  # 9
    # q (backward)
    view_17: "bf16[32, 128]" = torch.ops.aten.view.default(tangents_1, [-1, 128])  # 9
    view_18: "bf16[32, 128]" = torch.ops.aten.view.default(mul_2, [-1, 128])  # 9
    view_19: "bf16[32, 4, 32]" = torch.ops.aten.view.default(view_17, [32, 4, 32])  # 9
    abs_3: "bf16[32, 4, 32]" = torch.ops.aten.abs.default(view_19)  # 9
    amax_3: "bf16[32, 4]" = torch.ops.aten.amax.default(abs_3, [-1])  # 9
    unsqueeze_3: "bf16[32, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_3, -1)  # 9
    _to_copy_19: "f32[32, 4, 32]" = torch.ops.aten._to_copy.default(view_19, dtype=torch.float32)  # 9
    _to_copy_20: "f32[32, 4, 1]" = torch.ops.aten._to_copy.default(unsqueeze_3, dtype=torch.float32)  # 9
    div_3: "f32[32, 4, 1]" = torch.ops.aten.div.Tensor(_to_copy_20, 448.0)  # 9
    isnan_3: "b8[32, 4, 1]" = torch.ops.aten.isnan.default(div_3)  # 9
    log2_3: "f32[32, 4, 1]" = torch.ops.aten.log2.default(div_3)  # 9
    ceil_3: "f32[32, 4, 1]" = torch.ops.aten.ceil.default(log2_3)  # 9
    clamp_5: "f32[32, 4, 1]" = torch.ops.aten.clamp.default(ceil_3, -127, 127)  # 9
    add_4: "f32[32, 4, 1]" = torch.ops.aten.add.Tensor(clamp_5, 127)  # 9
    _to_copy_21: "u8[32, 4, 1]" = torch.ops.aten._to_copy.default(add_4, dtype=torch.uint8)  # 9
    scalar_tensor_7: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_7: "u8[32, 4, 1]" = torch.ops.aten.where.self(isnan_3, scalar_tensor_7, _to_copy_21)  # 9
    eq_3: "b8[32, 4, 1]" = torch.ops.aten.eq.Scalar(where_7, 0)  # 9
    _to_copy_22: "f32[32, 4, 1]" = torch.ops.aten._to_copy.default(where_7, dtype=torch.float32)  # 9
    rsub_3: "f32[32, 4, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_22, 127)  # 9
    exp2_3: "f32[32, 4, 1]" = torch.ops.aten.exp2.default(rsub_3)  # 9
    scalar_tensor_8: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_8: "f32[32, 4, 1]" = torch.ops.aten.where.self(eq_3, scalar_tensor_8, exp2_3)  # 9
    mul_7: "f32[32, 4, 32]" = torch.ops.aten.mul.Tensor(_to_copy_19, where_8)  # 9
    clamp_6: "f32[32, 4, 32]" = torch.ops.aten.clamp.default(mul_7, -448.0, 448.0)  # 9
    _to_copy_23: "f8e4m3fn[32, 4, 32]" = torch.ops.aten._to_copy.default(clamp_6, dtype=torch.float8_e4m3fn)  # 9
    view_20: "f8e4m3fn[32, 128]" = torch.ops.aten.view.default(_to_copy_23, [32, 128])  # 9
    view_21: "f8e8m0fnu[32, 4, 1]" = torch.ops.aten.view.dtype(where_7, torch.float8_e8m0fnu)  # 9
    detach_4: "f8e8m0fnu[32, 4, 1]" = torch.ops.aten.detach.default(view_21)  # 9
    squeeze_3: "f8e8m0fnu[32, 4]" = torch.ops.aten.squeeze.dim(detach_4, -1)  # 9
    t_6: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(primals_3)  # 9
    clone_1: "bf16[128, 128]" = torch.ops.aten.clone.default(t_6, memory_format=torch.contiguous_format)  # 9
    view_22: "bf16[128, 4, 32]" = torch.ops.aten.view.default(clone_1, [128, 4, 32])  # 9
    abs_4: "bf16[128, 4, 32]" = torch.ops.aten.abs.default(view_22)  # 9
    amax_4: "bf16[128, 4]" = torch.ops.aten.amax.default(abs_4, [-1])  # 9
    unsqueeze_4: "bf16[128, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_4, -1)  # 9
    _to_copy_24: "f32[128, 4, 32]" = torch.ops.aten._to_copy.default(view_22, dtype=torch.float32)  # 9
    _to_copy_25: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(unsqueeze_4, dtype=torch.float32)  # 9
    div_4: "f32[128, 4, 1]" = torch.ops.aten.div.Tensor(_to_copy_25, 448.0)  # 9
    isnan_4: "b8[128, 4, 1]" = torch.ops.aten.isnan.default(div_4)  # 9
    log2_4: "f32[128, 4, 1]" = torch.ops.aten.log2.default(div_4)  # 9
    ceil_4: "f32[128, 4, 1]" = torch.ops.aten.ceil.default(log2_4)  # 9
    clamp_7: "f32[128, 4, 1]" = torch.ops.aten.clamp.default(ceil_4, -127, 127)  # 9
    add_5: "f32[128, 4, 1]" = torch.ops.aten.add.Tensor(clamp_7, 127)  # 9
    _to_copy_26: "u8[128, 4, 1]" = torch.ops.aten._to_copy.default(add_5, dtype=torch.uint8)  # 9
    scalar_tensor_9: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_9: "u8[128, 4, 1]" = torch.ops.aten.where.self(isnan_4, scalar_tensor_9, _to_copy_26)  # 9
    eq_4: "b8[128, 4, 1]" = torch.ops.aten.eq.Scalar(where_9, 0)  # 9
    _to_copy_27: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(where_9, dtype=torch.float32)  # 9
    rsub_4: "f32[128, 4, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_27, 127)  # 9
    exp2_4: "f32[128, 4, 1]" = torch.ops.aten.exp2.default(rsub_4)  # 9
    scalar_tensor_10: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_10: "f32[128, 4, 1]" = torch.ops.aten.where.self(eq_4, scalar_tensor_10, exp2_4)  # 9
    mul_8: "f32[128, 4, 32]" = torch.ops.aten.mul.Tensor(_to_copy_24, where_10)  # 9
    clamp_8: "f32[128, 4, 32]" = torch.ops.aten.clamp.default(mul_8, -448.0, 448.0)  # 9
    _to_copy_28: "f8e4m3fn[128, 4, 32]" = torch.ops.aten._to_copy.default(clamp_8, dtype=torch.float8_e4m3fn)  # 9
    view_23: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(_to_copy_28, [128, 128])  # 9
    view_24: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(where_9, torch.float8_e8m0fnu)  # 9
    detach_5: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.detach.default(view_24)  # 9
    squeeze_4: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(detach_5, -1)  # 9
    t_7: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(view_23)  # 9
    t_8: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.t.default(squeeze_4)  # 9
    _to_copy_29: "bf16[32, 128]" = torch.ops.aten._to_copy.default(view_20, dtype=torch.bfloat16)  # 9
    view_25: "bf16[128, 32]" = torch.ops.aten.view.default(_to_copy_29, [-1, 32])  # 9
    view_26: "u8[32, 4]" = torch.ops.aten.view.dtype(squeeze_3, torch.uint8)  # 9
    _to_copy_30: "i16[32, 4]" = torch.ops.aten._to_copy.default(view_26, dtype=torch.int16)  # 9
    sub_3: "i16[32, 4]" = torch.ops.aten.sub.Tensor(_to_copy_30, 127)  # 9
    full_like_3: "f32[32, 4]" = torch.ops.aten.full_like.default(sub_3, 2.0, dtype=torch.float32, pin_memory=False)  # 9
    pow_4: "f32[32, 4]" = torch.ops.aten.pow.Tensor_Tensor(full_like_3, sub_3)  # 9
    ne_3: "b8[32, 4]" = torch.ops.aten.ne.Scalar(view_26, 255)  # 9
    scalar_tensor_11: "f32[]" = torch.ops.aten.scalar_tensor.default(nan, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_11: "f32[32, 4]" = torch.ops.aten.where.self(ne_3, pow_4, scalar_tensor_11)  # 9
    view_27: "f32[128, 1]" = torch.ops.aten.view.default(where_11, [-1, 1])  # 9
    _to_copy_31: "bf16[128, 1]" = torch.ops.aten._to_copy.default(view_27, dtype=torch.bfloat16)  # 9
    mul_9: "bf16[128, 32]" = torch.ops.aten.mul.Tensor(view_25, _to_copy_31)  # 9
    view_28: "bf16[32, 128]" = torch.ops.aten.view.default(mul_9, [32, 128])  # 9
    t_9: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(t_7)  # 9
    t_10: "f8e8m0fnu[128, 4]" = torch.ops.aten.t.default(t_8)  # 9
    _to_copy_32: "bf16[128, 128]" = torch.ops.aten._to_copy.default(t_9, dtype=torch.bfloat16)  # 9
    view_29: "bf16[512, 32]" = torch.ops.aten.view.default(_to_copy_32, [-1, 32])  # 9
    view_30: "u8[128, 4]" = torch.ops.aten.view.dtype(t_10, torch.uint8)  # 9
    _to_copy_33: "i16[128, 4]" = torch.ops.aten._to_copy.default(view_30, dtype=torch.int16)  # 9
    sub_4: "i16[128, 4]" = torch.ops.aten.sub.Tensor(_to_copy_33, 127)  # 9
    full_like_4: "f32[128, 4]" = torch.ops.aten.full_like.default(sub_4, 2.0, dtype=torch.float32, pin_memory=False)  # 9
    pow_5: "f32[128, 4]" = torch.ops.aten.pow.Tensor_Tensor(full_like_4, sub_4)  # 9
    ne_4: "b8[128, 4]" = torch.ops.aten.ne.Scalar(view_30, 255)  # 9
    scalar_tensor_12: "f32[]" = torch.ops.aten.scalar_tensor.default(nan, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_12: "f32[128, 4]" = torch.ops.aten.where.self(ne_4, pow_5, scalar_tensor_12)  # 9
    view_31: "f32[512, 1]" = torch.ops.aten.view.default(where_12, [-1, 1])  # 9
    _to_copy_34: "bf16[512, 1]" = torch.ops.aten._to_copy.default(view_31, dtype=torch.bfloat16)  # 9
    mul_10: "bf16[512, 32]" = torch.ops.aten.mul.Tensor(view_29, _to_copy_34)  # 9
    view_32: "bf16[128, 128]" = torch.ops.aten.view.default(mul_10, [128, 128])  # 9
    t_11: "bf16[128, 128] (1, 128)" = torch.ops.aten.t.default(view_32)  # 9
    mm_2: "bf16[32, 128]" = torch.ops.aten.mm.default(view_28, t_11)  # 9
    view_33: "bf16[2, 16, 128]" = torch.ops.aten.view.default(mm_2, [2, 16, 128])  # 9
    t_12: "bf16[128, 32] (1, 128)" = torch.ops.aten.t.default(view_17)  # 9
    clone_2: "bf16[128, 32]" = torch.ops.aten.clone.default(t_12, memory_format=torch.contiguous_format)  # 9
    view_34: "bf16[128, 1, 32]" = torch.ops.aten.view.default(clone_2, [128, 1, 32])  # 9
    abs_5: "bf16[128, 1, 32]" = torch.ops.aten.abs.default(view_34)  # 9
    amax_5: "bf16[128, 1]" = torch.ops.aten.amax.default(abs_5, [-1])  # 9
    unsqueeze_5: "bf16[128, 1, 1]" = torch.ops.aten.unsqueeze.default(amax_5, -1)  # 9
    _to_copy_35: "f32[128, 1, 32]" = torch.ops.aten._to_copy.default(view_34, dtype=torch.float32)  # 9
    _to_copy_36: "f32[128, 1, 1]" = torch.ops.aten._to_copy.default(unsqueeze_5, dtype=torch.float32)  # 9
    div_5: "f32[128, 1, 1]" = torch.ops.aten.div.Tensor(_to_copy_36, 448.0)  # 9
    isnan_5: "b8[128, 1, 1]" = torch.ops.aten.isnan.default(div_5)  # 9
    log2_5: "f32[128, 1, 1]" = torch.ops.aten.log2.default(div_5)  # 9
    ceil_5: "f32[128, 1, 1]" = torch.ops.aten.ceil.default(log2_5)  # 9
    clamp_9: "f32[128, 1, 1]" = torch.ops.aten.clamp.default(ceil_5, -127, 127)  # 9
    add_6: "f32[128, 1, 1]" = torch.ops.aten.add.Tensor(clamp_9, 127)  # 9
    _to_copy_37: "u8[128, 1, 1]" = torch.ops.aten._to_copy.default(add_6, dtype=torch.uint8)  # 9
    scalar_tensor_13: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_13: "u8[128, 1, 1]" = torch.ops.aten.where.self(isnan_5, scalar_tensor_13, _to_copy_37)  # 9
    eq_5: "b8[128, 1, 1]" = torch.ops.aten.eq.Scalar(where_13, 0)  # 9
    _to_copy_38: "f32[128, 1, 1]" = torch.ops.aten._to_copy.default(where_13, dtype=torch.float32)  # 9
    rsub_5: "f32[128, 1, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_38, 127)  # 9
    exp2_5: "f32[128, 1, 1]" = torch.ops.aten.exp2.default(rsub_5)  # 9
    scalar_tensor_14: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_14: "f32[128, 1, 1]" = torch.ops.aten.where.self(eq_5, scalar_tensor_14, exp2_5)  # 9
    mul_11: "f32[128, 1, 32]" = torch.ops.aten.mul.Tensor(_to_copy_35, where_14)  # 9
    clamp_10: "f32[128, 1, 32]" = torch.ops.aten.clamp.default(mul_11, -448.0, 448.0)  # 9
    _to_copy_39: "f8e4m3fn[128, 1, 32]" = torch.ops.aten._to_copy.default(clamp_10, dtype=torch.float8_e4m3fn)  # 9
    view_35: "f8e4m3fn[128, 32]" = torch.ops.aten.view.default(_to_copy_39, [128, 32])  # 9
    view_36: "f8e8m0fnu[128, 1, 1]" = torch.ops.aten.view.dtype(where_13, torch.float8_e8m0fnu)  # 9
    detach_6: "f8e8m0fnu[128, 1, 1]" = torch.ops.aten.detach.default(view_36)  # 9
    squeeze_5: "f8e8m0fnu[128, 1]" = torch.ops.aten.squeeze.dim(detach_6, -1)  # 9
    t_13: "f8e4m3fn[32, 128] (1, 32)" = torch.ops.aten.t.default(view_35)  # 9
    t_14: "f8e4m3fn[128, 32]" = torch.ops.aten.t.default(t_13)  # 9
    t_15: "bf16[128, 32] (1, 128)" = torch.ops.aten.t.default(view_18)  # 9
    clone_3: "bf16[128, 32]" = torch.ops.aten.clone.default(t_15, memory_format=torch.contiguous_format)  # 9
    view_37: "bf16[128, 1, 32]" = torch.ops.aten.view.default(clone_3, [128, 1, 32])  # 9
    abs_6: "bf16[128, 1, 32]" = torch.ops.aten.abs.default(view_37)  # 9
    amax_6: "bf16[128, 1]" = torch.ops.aten.amax.default(abs_6, [-1])  # 9
    unsqueeze_6: "bf16[128, 1, 1]" = torch.ops.aten.unsqueeze.default(amax_6, -1)  # 9
    _to_copy_40: "f32[128, 1, 32]" = torch.ops.aten._to_copy.default(view_37, dtype=torch.float32)  # 9
    _to_copy_41: "f32[128, 1, 1]" = torch.ops.aten._to_copy.default(unsqueeze_6, dtype=torch.float32)  # 9
    div_6: "f32[128, 1, 1]" = torch.ops.aten.div.Tensor(_to_copy_41, 448.0)  # 9
    isnan_6: "b8[128, 1, 1]" = torch.ops.aten.isnan.default(div_6)  # 9
    log2_6: "f32[128, 1, 1]" = torch.ops.aten.log2.default(div_6)  # 9
    ceil_6: "f32[128, 1, 1]" = torch.ops.aten.ceil.default(log2_6)  # 9
    clamp_11: "f32[128, 1, 1]" = torch.ops.aten.clamp.default(ceil_6, -127, 127)  # 9
    add_7: "f32[128, 1, 1]" = torch.ops.aten.add.Tensor(clamp_11, 127)  # 9
    _to_copy_42: "u8[128, 1, 1]" = torch.ops.aten._to_copy.default(add_7, dtype=torch.uint8)  # 9
    scalar_tensor_15: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_15: "u8[128, 1, 1]" = torch.ops.aten.where.self(isnan_6, scalar_tensor_15, _to_copy_42)  # 9
    eq_6: "b8[128, 1, 1]" = torch.ops.aten.eq.Scalar(where_15, 0)  # 9
    _to_copy_43: "f32[128, 1, 1]" = torch.ops.aten._to_copy.default(where_15, dtype=torch.float32)  # 9
    rsub_6: "f32[128, 1, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_43, 127)  # 9
    exp2_6: "f32[128, 1, 1]" = torch.ops.aten.exp2.default(rsub_6)  # 9
    scalar_tensor_16: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_16: "f32[128, 1, 1]" = torch.ops.aten.where.self(eq_6, scalar_tensor_16, exp2_6)  # 9
    mul_12: "f32[128, 1, 32]" = torch.ops.aten.mul.Tensor(_to_copy_40, where_16)  # 9
    clamp_12: "f32[128, 1, 32]" = torch.ops.aten.clamp.default(mul_12, -448.0, 448.0)  # 9
    _to_copy_44: "f8e4m3fn[128, 1, 32]" = torch.ops.aten._to_copy.default(clamp_12, dtype=torch.float8_e4m3fn)  # 9
    view_38: "f8e4m3fn[128, 32]" = torch.ops.aten.view.default(_to_copy_44, [128, 32])  # 9
    view_39: "f8e8m0fnu[128, 1, 1]" = torch.ops.aten.view.dtype(where_15, torch.float8_e8m0fnu)  # 9
    detach_7: "f8e8m0fnu[128, 1, 1]" = torch.ops.aten.detach.default(view_39)  # 9
    squeeze_6: "f8e8m0fnu[128, 1]" = torch.ops.aten.squeeze.dim(detach_7, -1)  # 9
    t_16: "f8e4m3fn[32, 128] (1, 32)" = torch.ops.aten.t.default(view_38)  # 9
    t_17: "f8e4m3fn[128, 32]" = torch.ops.aten.t.default(t_16)  # 9
    t_18: "f8e4m3fn[32, 128] (1, 32)" = torch.ops.aten.t.default(t_17)  # 9
    t_19: "f8e8m0fnu[1, 128]" = torch.ops.aten.t.default(squeeze_6)  # 9
    _to_copy_45: "bf16[128, 32]" = torch.ops.aten._to_copy.default(t_14, dtype=torch.bfloat16)  # 9
    view_40: "bf16[128, 32]" = torch.ops.aten.view.default(_to_copy_45, [-1, 32])  # 9
    view_41: "u8[128, 1]" = torch.ops.aten.view.dtype(squeeze_5, torch.uint8)  # 9
    _to_copy_46: "i16[128, 1]" = torch.ops.aten._to_copy.default(view_41, dtype=torch.int16)  # 9
    sub_5: "i16[128, 1]" = torch.ops.aten.sub.Tensor(_to_copy_46, 127)  # 9
    full_like_5: "f32[128, 1]" = torch.ops.aten.full_like.default(sub_5, 2.0, dtype=torch.float32, pin_memory=False)  # 9
    pow_6: "f32[128, 1]" = torch.ops.aten.pow.Tensor_Tensor(full_like_5, sub_5)  # 9
    ne_5: "b8[128, 1]" = torch.ops.aten.ne.Scalar(view_41, 255)  # 9
    scalar_tensor_17: "f32[]" = torch.ops.aten.scalar_tensor.default(nan, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_17: "f32[128, 1]" = torch.ops.aten.where.self(ne_5, pow_6, scalar_tensor_17)  # 9
    view_42: "f32[128, 1]" = torch.ops.aten.view.default(where_17, [-1, 1])  # 9
    _to_copy_47: "bf16[128, 1]" = torch.ops.aten._to_copy.default(view_42, dtype=torch.bfloat16)  # 9
    mul_13: "bf16[128, 32]" = torch.ops.aten.mul.Tensor(view_40, _to_copy_47)  # 9
    view_43: "bf16[128, 32]" = torch.ops.aten.view.default(mul_13, [128, 32])  # 9
    t_20: "f8e4m3fn[128, 32]" = torch.ops.aten.t.default(t_18)  # 9
    t_21: "f8e8m0fnu[128, 1]" = torch.ops.aten.t.default(t_19)  # 9
    _to_copy_48: "bf16[128, 32]" = torch.ops.aten._to_copy.default(t_20, dtype=torch.bfloat16)  # 9
    view_44: "bf16[128, 32]" = torch.ops.aten.view.default(_to_copy_48, [-1, 32])  # 9
    view_45: "u8[128, 1]" = torch.ops.aten.view.dtype(t_21, torch.uint8)  # 9
    _to_copy_49: "i16[128, 1]" = torch.ops.aten._to_copy.default(view_45, dtype=torch.int16)  # 9
    sub_6: "i16[128, 1]" = torch.ops.aten.sub.Tensor(_to_copy_49, 127)  # 9
    full_like_6: "f32[128, 1]" = torch.ops.aten.full_like.default(sub_6, 2.0, dtype=torch.float32, pin_memory=False)  # 9
    pow_7: "f32[128, 1]" = torch.ops.aten.pow.Tensor_Tensor(full_like_6, sub_6)  # 9
    ne_6: "b8[128, 1]" = torch.ops.aten.ne.Scalar(view_45, 255)  # 9
    scalar_tensor_18: "f32[]" = torch.ops.aten.scalar_tensor.default(nan, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_18: "f32[128, 1]" = torch.ops.aten.where.self(ne_6, pow_7, scalar_tensor_18)  # 9
    view_46: "f32[128, 1]" = torch.ops.aten.view.default(where_18, [-1, 1])  # 9
    _to_copy_50: "bf16[128, 1]" = torch.ops.aten._to_copy.default(view_46, dtype=torch.bfloat16)  # 9
    mul_14: "bf16[128, 32]" = torch.ops.aten.mul.Tensor(view_44, _to_copy_50)  # 9
    view_47: "bf16[128, 32]" = torch.ops.aten.view.default(mul_14, [128, 32])  # 9
    t_22: "bf16[32, 128] (1, 32)" = torch.ops.aten.t.default(view_47)  # 9
    mm_3: "bf16[128, 128]" = torch.ops.aten.mm.default(view_43, t_22)  # 9
    # norm (backward)
    mul_15: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(view_33, primals_1)  # 8
    mul_16: "bf16[2, 16, 128]" = torch.ops.aten.mul.Tensor(view_33, _to_copy_2)  # 8
    sum_1: "bf16[1, 1, 128]" = torch.ops.aten.sum.dim_IntList(mul_16, [0, 1], True)  # 8
    view_48: "bf16[128]" = torch.ops.aten.view.default(sum_1, [128])  # 8
    _to_copy_51: "f32[2, 16, 128]" = torch.ops.aten._to_copy.default(mul_15, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 7
    mul_17: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_51, _to_copy_1)  # 6
    mul_18: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(_to_copy_51, rsqrt_1)  # 6
    sum_2: "f32[2, 16, 1]" = torch.ops.aten.sum.dim_IntList(mul_17, [2], True)  # 6
    detach_8: "f32[2, 16, 1]" = torch.ops.aten.detach.default(detach_1)  # 5
    pow_8: "f32[2, 16, 1]" = torch.ops.aten.pow.Tensor_Scalar(detach_8, 3)  # 5
    mul_19: "f32[2, 16, 1]" = torch.ops.aten.mul.Scalar(sum_2, -0.5)  # 5
    mul_20: "f32[2, 16, 1]" = torch.ops.aten.mul.Tensor(mul_19, pow_8)  # 5
    expand_1: "f32[2, 16, 128] (16, 1, 0)" = torch.ops.aten.expand.default(mul_20, [2, 16, 128])  # 3
    div_7: "f32[2, 16, 128]" = torch.ops.aten.div.Scalar(expand_1, 128)  # 3
    pow_9: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 1.0)  # 2
    mul_21: "f32[2, 16, 128]" = torch.ops.aten.mul.Scalar(pow_9, 2.0)  # 2
    mul_22: "f32[2, 16, 128]" = torch.ops.aten.mul.Tensor(div_7, mul_21)  # 2
    # - (backward)
    add_8: "f32[2, 16, 128]" = torch.ops.aten.add.Tensor(mul_18, mul_22)  # 9
    # norm (backward)
    _to_copy_52: "bf16[2, 16, 128]" = torch.ops.aten._to_copy.default(add_8, device=device(type='cpu'), dtype=torch.bfloat16, layout=torch.strided)  # 1
    return [view_16, view_48, _to_copy_52, mm_3]
