# ruff: noqa
# fmt: off
"""sm100-training-rceil-torch-triton, decompositions: aten."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = []


def graph(
    primals_1: "bf16[128]",
    primals_2: "bf16[1, 128, 128]",
    primals_3: "bf16[128, 128]",
    tangents_1: "bf16[1, 128, 128]",
):
    # norm
    _to_copy_1: "f32[1, 128, 128]" = torch.ops.aten._to_copy.default(primals_2, dtype=torch.float32)  # 1
    pow_1: "f32[1, 128, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 2)  # 2
    mean_1: "f32[1, 128, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)  # 3
    add_1: "f32[1, 128, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)  # 4
    rsqrt_1: "f32[1, 128, 1]" = torch.ops.aten.rsqrt.default(add_1)  # 5
    detach_1: "f32[1, 128, 1]" = torch.ops.aten.detach.default(rsqrt_1)  # 5
    mul_1: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(_to_copy_1, rsqrt_1)  # 6
    _to_copy_2: "bf16[1, 128, 128]" = torch.ops.aten._to_copy.default(mul_1, dtype=torch.bfloat16)  # 7
    mul_2: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(primals_1, _to_copy_2)  # 8
    # q
    view_1: "bf16[128, 128]" = torch.ops.aten.view.default(mul_2, [-1, 128])  # 9
    view_2: "bf16[128, 4, 32]" = torch.ops.aten.view.default(view_1, [128, 4, 32])  # 9
    abs_1: "bf16[128, 4, 32]" = torch.ops.aten.abs.default(view_2)  # 9
    amax_1: "bf16[128, 4]" = torch.ops.aten.amax.default(abs_1, [-1])  # 9
    unsqueeze_1: "bf16[128, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_1, -1)  # 9
    _to_copy_3: "f32[128, 4, 32]" = torch.ops.aten._to_copy.default(view_2, dtype=torch.float32)  # 9
    _to_copy_4: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(unsqueeze_1, dtype=torch.float32)  # 9
    div_1: "f32[128, 4, 1]" = torch.ops.aten.div.Tensor(_to_copy_4, 448.0)  # 9
    isnan_1: "b8[128, 4, 1]" = torch.ops.aten.isnan.default(div_1)  # 9
    log2_1: "f32[128, 4, 1]" = torch.ops.aten.log2.default(div_1)  # 9
    ceil_1: "f32[128, 4, 1]" = torch.ops.aten.ceil.default(log2_1)  # 9
    clamp_1: "f32[128, 4, 1]" = torch.ops.aten.clamp.default(ceil_1, -127, 127)  # 9
    add_2: "f32[128, 4, 1]" = torch.ops.aten.add.Tensor(clamp_1, 127)  # 9
    _to_copy_5: "u8[128, 4, 1]" = torch.ops.aten._to_copy.default(add_2, dtype=torch.uint8)  # 9
    scalar_tensor_1: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_1: "u8[128, 4, 1]" = torch.ops.aten.where.self(isnan_1, scalar_tensor_1, _to_copy_5)  # 9
    eq_1: "b8[128, 4, 1]" = torch.ops.aten.eq.Scalar(where_1, 0)  # 9
    _to_copy_6: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(where_1, dtype=torch.float32)  # 9
    rsub_1: "f32[128, 4, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_6, 127)  # 9
    exp2_1: "f32[128, 4, 1]" = torch.ops.aten.exp2.default(rsub_1)  # 9
    scalar_tensor_2: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_2: "f32[128, 4, 1]" = torch.ops.aten.where.self(eq_1, scalar_tensor_2, exp2_1)  # 9
    mul_3: "f32[128, 4, 32]" = torch.ops.aten.mul.Tensor(_to_copy_3, where_2)  # 9
    clamp_2: "f32[128, 4, 32]" = torch.ops.aten.clamp.default(mul_3, -448.0, 448.0)  # 9
    _to_copy_7: "f8e4m3fn[128, 4, 32]" = torch.ops.aten._to_copy.default(clamp_2, dtype=torch.float8_e4m3fn)  # 9
    view_3: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(_to_copy_7, [128, 128])  # 9
    view_4: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(where_1, torch.float8_e8m0fnu)  # 9
    detach_2: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.detach.default(view_4)  # 9
    squeeze_1: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(detach_2, -1)  # 9
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
    view_8: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(squeeze_1, [128, 4])  # 9
    zeros_1: "f8e8m0fnu[128, 4]" = torch.ops.aten.zeros.default([128, 4], device=device(type='cpu'), dtype=torch.float8_e8m0fnu, pin_memory=False)  # 9
    copy_1: "f8e8m0fnu[128, 4]" = torch.ops.aten.copy.default(zeros_1, view_8)  # 9
    view_9: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(copy_1, [1, 128, 1, 4])  # 9
    permute_1: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_9, [0, 2, 1, 3])  # 9
    view_10: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_1, [-1, 4, 32, 4])  # 9
    transpose_1: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_10, 1, 2)  # 9
    clone_1: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_1, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_1: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_1, [1, 32, 16])  # 9
    view_11: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_1, [512])  # 9
    t_3: "f8e8m0fnu[128, 4]" = torch.ops.aten.t.default(t_2)  # 9
    view_12: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(t_3, [128, 4])  # 9
    zeros_2: "f8e8m0fnu[128, 4]" = torch.ops.aten.zeros.default([128, 4], device=device(type='cpu'), dtype=torch.float8_e8m0fnu, pin_memory=False)  # 9
    copy_2: "f8e8m0fnu[128, 4]" = torch.ops.aten.copy.default(zeros_2, view_12)  # 9
    view_13: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(copy_2, [1, 128, 1, 4])  # 9
    permute_2: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_13, [0, 2, 1, 3])  # 9
    view_14: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_2, [-1, 4, 32, 4])  # 9
    transpose_2: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_14, 1, 2)  # 9
    clone_2: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_2, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_2: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_2, [1, 32, 16])  # 9
    view_15: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_2, [512])  # 9
    view_16: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_11, torch.float8_e8m0fnu)  # 9
    view_17: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_15, torch.float8_e8m0fnu)  # 9
    _scaled_mm_1: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(view_3, t_1, view_16, view_17, None, None, torch.bfloat16)  # 9
    view_18: "bf16[1, 128, 128]" = torch.ops.aten.view.default(_scaled_mm_1, [1, 128, 128])  # 9
    # q (backward)
    view_19: "bf16[128, 128]" = torch.ops.aten.view.default(tangents_1, [-1, 128])  # 9
    view_20: "bf16[128, 128]" = torch.ops.aten.view.default(mul_2, [-1, 128])  # 9
    view_21: "bf16[128, 4, 32]" = torch.ops.aten.view.default(view_19, [128, 4, 32])  # 9
    abs_3: "bf16[128, 4, 32]" = torch.ops.aten.abs.default(view_21)  # 9
    amax_3: "bf16[128, 4]" = torch.ops.aten.amax.default(abs_3, [-1])  # 9
    unsqueeze_3: "bf16[128, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_3, -1)  # 9
    _to_copy_13: "f32[128, 4, 32]" = torch.ops.aten._to_copy.default(view_21, dtype=torch.float32)  # 9
    _to_copy_14: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(unsqueeze_3, dtype=torch.float32)  # 9
    div_3: "f32[128, 4, 1]" = torch.ops.aten.div.Tensor(_to_copy_14, 448.0)  # 9
    isnan_3: "b8[128, 4, 1]" = torch.ops.aten.isnan.default(div_3)  # 9
    log2_3: "f32[128, 4, 1]" = torch.ops.aten.log2.default(div_3)  # 9
    ceil_3: "f32[128, 4, 1]" = torch.ops.aten.ceil.default(log2_3)  # 9
    clamp_5: "f32[128, 4, 1]" = torch.ops.aten.clamp.default(ceil_3, -127, 127)  # 9
    add_4: "f32[128, 4, 1]" = torch.ops.aten.add.Tensor(clamp_5, 127)  # 9
    _to_copy_15: "u8[128, 4, 1]" = torch.ops.aten._to_copy.default(add_4, dtype=torch.uint8)  # 9
    scalar_tensor_5: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_5: "u8[128, 4, 1]" = torch.ops.aten.where.self(isnan_3, scalar_tensor_5, _to_copy_15)  # 9
    eq_3: "b8[128, 4, 1]" = torch.ops.aten.eq.Scalar(where_5, 0)  # 9
    _to_copy_16: "f32[128, 4, 1]" = torch.ops.aten._to_copy.default(where_5, dtype=torch.float32)  # 9
    rsub_3: "f32[128, 4, 1]" = torch.ops.aten.rsub.Scalar(_to_copy_16, 127)  # 9
    exp2_3: "f32[128, 4, 1]" = torch.ops.aten.exp2.default(rsub_3)  # 9
    scalar_tensor_6: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_6: "f32[128, 4, 1]" = torch.ops.aten.where.self(eq_3, scalar_tensor_6, exp2_3)  # 9
    mul_5: "f32[128, 4, 32]" = torch.ops.aten.mul.Tensor(_to_copy_13, where_6)  # 9
    clamp_6: "f32[128, 4, 32]" = torch.ops.aten.clamp.default(mul_5, -448.0, 448.0)  # 9
    _to_copy_17: "f8e4m3fn[128, 4, 32]" = torch.ops.aten._to_copy.default(clamp_6, dtype=torch.float8_e4m3fn)  # 9
    view_22: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(_to_copy_17, [128, 128])  # 9
    view_23: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(where_5, torch.float8_e8m0fnu)  # 9
    detach_4: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.detach.default(view_23)  # 9
    squeeze_3: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(detach_4, -1)  # 9
    empty_1: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_2: "u8[128, 4, 1]" = torch.ops.aten.empty.memory_format([128, 4, 1], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_1 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim1_kernel'), kwargs={'x_ptr': primals_3, 'output_col_major_ptr': empty_1, 'col_scale_ptr': empty_2, 'n_rows': 128, 'n_cols': 128, 'INNER_BLOCK_SIZE': 32, 'SCALING_MODE': 'rceil'}, launch_kwargs=('x_ptr', 'output_col_major_ptr', 'col_scale_ptr', 'n_rows', 'n_cols', 'INNER_BLOCK_SIZE', 'SCALING_MODE'), tensors_to_clone=['output_col_major_ptr', 'col_scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_1: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_1, 'output_col_major_ptr')  # 9
    getitem_2: "u8[128, 4, 1]" = operator.getitem(triton_kernel_wrapper_functional_1, 'col_scale_ptr')  # 9
    t_4: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(getitem_1)  # 9
    t_5: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(t_4)  # 9
    t_6: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(t_5)  # 9
    view_24: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(squeeze_3, [128, 4])  # 9
    zeros_3: "f8e8m0fnu[128, 4]" = torch.ops.aten.zeros.default([128, 4], device=device(type='cpu'), dtype=torch.float8_e8m0fnu, pin_memory=False)  # 9
    copy_3: "f8e8m0fnu[128, 4]" = torch.ops.aten.copy.default(zeros_3, view_24)  # 9
    view_25: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(copy_3, [1, 128, 1, 4])  # 9
    permute_3: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_25, [0, 2, 1, 3])  # 9
    view_26: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_3, [-1, 4, 32, 4])  # 9
    transpose_3: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_26, 1, 2)  # 9
    clone_3: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_3, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_3: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_3, [1, 32, 16])  # 9
    view_27: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_3, [512])  # 9
    zeros_4: "f8e8m0fnu[128, 4]" = torch.ops.aten.zeros.default([128, 4], device=device(type='cpu'), dtype=torch.float8_e8m0fnu, pin_memory=False)  # 9
    view_28: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(getitem_2, torch.float8_e8m0fnu)  # 9
    squeeze_4: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(view_28, -1)  # 9
    t_7: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.t.default(squeeze_4)  # 9
    t_8: "f8e8m0fnu[128, 4]" = torch.ops.aten.t.default(t_7)  # 9
    view_29: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(t_8, [128, 4])  # 9
    copy_4: "f8e8m0fnu[128, 4]" = torch.ops.aten.copy.default(zeros_4, view_29)  # 9
    view_30: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(copy_4, [1, 128, 1, 4])  # 9
    permute_4: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_30, [0, 2, 1, 3])  # 9
    view_31: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_4, [-1, 4, 32, 4])  # 9
    transpose_4: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_31, 1, 2)  # 9
    clone_4: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_4, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_4: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_4, [1, 32, 16])  # 9
    view_32: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_4, [512])  # 9
    view_33: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_27, torch.float8_e8m0fnu)  # 9
    view_34: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_32, torch.float8_e8m0fnu)  # 9
    _scaled_mm_2: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(view_22, t_6, view_33, view_34, None, None, torch.bfloat16)  # 9
    view_35: "bf16[1, 128, 128]" = torch.ops.aten.view.default(_scaled_mm_2, [1, 128, 128])  # 9
    empty_3: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_4: "u8[128, 4, 1]" = torch.ops.aten.empty.memory_format([128, 4, 1], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_2 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim1_kernel'), kwargs={'x_ptr': view_19, 'output_col_major_ptr': empty_3, 'col_scale_ptr': empty_4, 'n_rows': 128, 'n_cols': 128, 'INNER_BLOCK_SIZE': 32, 'SCALING_MODE': 'rceil'}, launch_kwargs=('x_ptr', 'output_col_major_ptr', 'col_scale_ptr', 'n_rows', 'n_cols', 'INNER_BLOCK_SIZE', 'SCALING_MODE'), tensors_to_clone=['output_col_major_ptr', 'col_scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_3: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_2, 'output_col_major_ptr')  # 9
    getitem_4: "u8[128, 4, 1]" = operator.getitem(triton_kernel_wrapper_functional_2, 'col_scale_ptr')  # 9
    empty_5: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_6: "u8[128, 4, 1]" = torch.ops.aten.empty.memory_format([128, 4, 1], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_3 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim1_kernel'), kwargs={'x_ptr': view_20, 'output_col_major_ptr': empty_5, 'col_scale_ptr': empty_6, 'n_rows': 128, 'n_cols': 128, 'INNER_BLOCK_SIZE': 32, 'SCALING_MODE': 'rceil'}, launch_kwargs=('x_ptr', 'output_col_major_ptr', 'col_scale_ptr', 'n_rows', 'n_cols', 'INNER_BLOCK_SIZE', 'SCALING_MODE'), tensors_to_clone=['output_col_major_ptr', 'col_scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_5: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_3, 'output_col_major_ptr')  # 9
    getitem_6: "u8[128, 4, 1]" = operator.getitem(triton_kernel_wrapper_functional_3, 'col_scale_ptr')  # 9
    t_9: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(getitem_5)  # 9
    t_10: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(t_9)  # 9
    t_11: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(t_10)  # 9
    zeros_5: "f8e8m0fnu[128, 4]" = torch.ops.aten.zeros.default([128, 4], device=device(type='cpu'), dtype=torch.float8_e8m0fnu, pin_memory=False)  # 9
    view_36: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(getitem_4, torch.float8_e8m0fnu)  # 9
    squeeze_5: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(view_36, -1)  # 9
    view_37: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(squeeze_5, [128, 4])  # 9
    copy_5: "f8e8m0fnu[128, 4]" = torch.ops.aten.copy.default(zeros_5, view_37)  # 9
    view_38: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(copy_5, [1, 128, 1, 4])  # 9
    permute_5: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_38, [0, 2, 1, 3])  # 9
    view_39: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_5, [-1, 4, 32, 4])  # 9
    transpose_5: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_39, 1, 2)  # 9
    clone_5: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_5, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_5: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_5, [1, 32, 16])  # 9
    view_40: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_5, [512])  # 9
    zeros_6: "f8e8m0fnu[128, 4]" = torch.ops.aten.zeros.default([128, 4], device=device(type='cpu'), dtype=torch.float8_e8m0fnu, pin_memory=False)  # 9
    view_41: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(getitem_6, torch.float8_e8m0fnu)  # 9
    squeeze_6: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(view_41, -1)  # 9
    t_12: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.t.default(squeeze_6)  # 9
    t_13: "f8e8m0fnu[128, 4]" = torch.ops.aten.t.default(t_12)  # 9
    view_42: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(t_13, [128, 4])  # 9
    copy_6: "f8e8m0fnu[128, 4]" = torch.ops.aten.copy.default(zeros_6, view_42)  # 9
    view_43: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(copy_6, [1, 128, 1, 4])  # 9
    permute_6: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_43, [0, 2, 1, 3])  # 9
    view_44: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_6, [-1, 4, 32, 4])  # 9
    transpose_6: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_44, 1, 2)  # 9
    clone_6: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_6, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_6: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_6, [1, 32, 16])  # 9
    view_45: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_6, [512])  # 9
    view_46: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_40, torch.float8_e8m0fnu)  # 9
    view_47: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_45, torch.float8_e8m0fnu)  # 9
    t_14: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(getitem_3)  # 9
    t_15: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(t_14)  # 9
    _scaled_mm_3: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(t_15, t_11, view_46, view_47, None, None, torch.bfloat16)  # 9
    # norm (backward)
    mul_6: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(view_35, primals_1)  # 8
    mul_7: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(view_35, _to_copy_2)  # 8
    sum_1: "bf16[1, 1, 128]" = torch.ops.aten.sum.dim_IntList(mul_7, [0, 1], True)  # 8
    view_48: "bf16[128]" = torch.ops.aten.view.default(sum_1, [128])  # 8
    _to_copy_18: "f32[1, 128, 128]" = torch.ops.aten._to_copy.default(mul_6, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 7
    mul_8: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(_to_copy_18, _to_copy_1)  # 6
    mul_9: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(_to_copy_18, rsqrt_1)  # 6
    sum_2: "f32[1, 128, 1]" = torch.ops.aten.sum.dim_IntList(mul_8, [2], True)  # 6
    detach_5: "f32[1, 128, 1]" = torch.ops.aten.detach.default(detach_1)  # 5
    pow_2: "f32[1, 128, 1]" = torch.ops.aten.pow.Tensor_Scalar(detach_5, 3)  # 5
    mul_10: "f32[1, 128, 1]" = torch.ops.aten.mul.Scalar(sum_2, -0.5)  # 5
    mul_11: "f32[1, 128, 1]" = torch.ops.aten.mul.Tensor(mul_10, pow_2)  # 5
    expand_1: "f32[1, 128, 128] (128, 1, 0)" = torch.ops.aten.expand.default(mul_11, [1, 128, 128])  # 3
    div_4: "f32[1, 128, 128]" = torch.ops.aten.div.Scalar(expand_1, 128)  # 3
    pow_3: "f32[1, 128, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 1.0)  # 2
    mul_12: "f32[1, 128, 128]" = torch.ops.aten.mul.Scalar(pow_3, 2.0)  # 2
    mul_13: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(div_4, mul_12)  # 2
    # - (backward)
    add_5: "f32[1, 128, 128]" = torch.ops.aten.add.Tensor(mul_9, mul_13)  # 9
    # norm (backward)
    _to_copy_19: "bf16[1, 128, 128]" = torch.ops.aten._to_copy.default(add_5, device=device(type='cpu'), dtype=torch.bfloat16, layout=torch.strided)  # 1
    return [view_18, view_48, _to_copy_19, _scaled_mm_3]
