# ruff: noqa
# fmt: off
"""sm100-training-floor-triton-cuda, decompositions: aten."""
import operator

import torch
from torch import device, inf, nan

SCHEMAS = ['torchao::mxfp8_quantize(Tensor input, bool rowwise, bool colwise, int scale_dim_x, int scale_dim_y, str fp8_format, str scaling_mode) -> (Tensor, Tensor, Tensor, Tensor)']


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
    view_2: "bf16[128, 128]" = torch.ops.aten.view.default(view_1, [-1, 128])  # 9
    empty_1: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_2: "u8[128, 4]" = torch.ops.aten.empty.memory_format([128, 4], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_1 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim0_kernel'), kwargs={'x_ptr': view_2, 'output_ptr': empty_1, 'scale_ptr': empty_2, 'n_rows': 128, 'n_cols': 128, 'SCALE_BLOCK_SIZE': 32, 'SCALING_MODE': 'floor'}, tensors_to_clone=['output_ptr', 'scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_1: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_1, 'output_ptr')  # 9
    getitem_2: "u8[128, 4]" = operator.getitem(triton_kernel_wrapper_functional_1, 'scale_ptr')  # 9
    view_3: "bf16[128, 128]" = torch.ops.aten.view.default(primals_3, [-1, 128])  # 9
    empty_3: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_4: "u8[128, 4]" = torch.ops.aten.empty.memory_format([128, 4], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_2 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim0_kernel'), kwargs={'x_ptr': view_3, 'output_ptr': empty_3, 'scale_ptr': empty_4, 'n_rows': 128, 'n_cols': 128, 'SCALE_BLOCK_SIZE': 32, 'SCALING_MODE': 'floor'}, tensors_to_clone=['output_ptr', 'scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_3: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_2, 'output_ptr')  # 9
    getitem_4: "u8[128, 4]" = operator.getitem(triton_kernel_wrapper_functional_2, 'scale_ptr')  # 9
    view_4: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(getitem_3, [128, 128])  # 9
    t_1: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(view_4)  # 9
    view_5: "u8[128, 4]" = torch.ops.aten.view.default(getitem_2, [128, 4])  # 9
    view_6: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.dtype(view_5, torch.float8_e8m0fnu)  # 9
    view_7: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(view_6, [128, 4])  # 9
    view_8: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_7, [1, 128, 1, 4])  # 9
    permute_1: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_8, [0, 2, 1, 3])  # 9
    view_9: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_1, [-1, 4, 32, 4])  # 9
    transpose_1: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_9, 1, 2)  # 9
    clone_1: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_1, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_1: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_1, [1, 32, 16])  # 9
    view_10: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_1, [512])  # 9
    view_11: "u8[128, 4]" = torch.ops.aten.view.default(getitem_4, [128, 4])  # 9
    view_12: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.dtype(view_11, torch.float8_e8m0fnu)  # 9
    t_2: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.t.default(view_12)  # 9
    t_3: "f8e8m0fnu[128, 4]" = torch.ops.aten.t.default(t_2)  # 9
    view_13: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(t_3, [128, 4])  # 9
    view_14: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_13, [1, 128, 1, 4])  # 9
    permute_2: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_14, [0, 2, 1, 3])  # 9
    view_15: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_2, [-1, 4, 32, 4])  # 9
    transpose_2: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_15, 1, 2)  # 9
    clone_2: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_2, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_2: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_2, [1, 32, 16])  # 9
    view_16: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_2, [512])  # 9
    view_17: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_10, torch.float8_e8m0fnu)  # 9
    view_18: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_16, torch.float8_e8m0fnu)  # 9
    view_19: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(getitem_1, [128, 128])  # 9
    _scaled_mm_1: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(view_19, t_1, view_17, view_18, None, None, torch.bfloat16)  # 9
    view_20: "bf16[1, 128, 128]" = torch.ops.aten.view.default(_scaled_mm_1, [1, 128, 128])  # 9
    # q (backward)
    view_21: "bf16[128, 128]" = torch.ops.aten.view.default(tangents_1, [-1, 128])  # 9
    view_22: "bf16[128, 128]" = torch.ops.aten.view.default(mul_2, [-1, 128])  # 9
    view_23: "bf16[128, 128]" = torch.ops.aten.view.default(view_21, [-1, 128])  # 9
    empty_5: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_6: "u8[128, 4]" = torch.ops.aten.empty.memory_format([128, 4], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_3 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim0_kernel'), kwargs={'x_ptr': view_23, 'output_ptr': empty_5, 'scale_ptr': empty_6, 'n_rows': 128, 'n_cols': 128, 'SCALE_BLOCK_SIZE': 32, 'SCALING_MODE': 'floor'}, tensors_to_clone=['output_ptr', 'scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_5: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_3, 'output_ptr')  # 9
    getitem_6: "u8[128, 4]" = operator.getitem(triton_kernel_wrapper_functional_3, 'scale_ptr')  # 9
    mxfp8_quantize_1: "f8e4m3fn[0]; f8e4m3fn[128, 128] (1, 128); f8e8m0fnu[0]; f8e8m0fnu[128, 4] (1, 128)" = torch.ops.torchao.mxfp8_quantize.default(primals_3, False, True, 1, 32, 'e4m3', 'floor')  # 9
    getitem_7: "f8e4m3fn[128, 128] (1, 128)" = operator.getitem(mxfp8_quantize_1, 1)  # 9
    getitem_8: "f8e8m0fnu[128, 4] (1, 128)" = operator.getitem(mxfp8_quantize_1, 3)  # 9
    t_4: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(getitem_7)  # 9
    t_5: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(t_4)  # 9
    t_6: "f8e8m0fnu[4, 128]" = torch.ops.aten.t.default(getitem_8)  # 9
    view_24: "u8[128, 4]" = torch.ops.aten.view.default(getitem_6, [128, 4])  # 9
    view_25: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.dtype(view_24, torch.float8_e8m0fnu)  # 9
    view_26: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(view_25, [128, 4])  # 9
    view_27: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_26, [1, 128, 1, 4])  # 9
    permute_3: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_27, [0, 2, 1, 3])  # 9
    view_28: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_3, [-1, 4, 32, 4])  # 9
    transpose_3: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.transpose.int(view_28, 1, 2)  # 9
    clone_3: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_3, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_3: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_3, [1, 32, 16])  # 9
    view_29: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_3, [512])  # 9
    t_7: "f8e8m0fnu[128, 4] (1, 128)" = torch.ops.aten.t.default(t_6)  # 9
    view_30: "f8e8m0fnu[128, 4] (1, 128)" = torch.ops.aten.view.default(t_7, [128, 4])  # 9
    view_31: "f8e8m0fnu[1, 128, 1, 4] (128, 1, 512, 128)" = torch.ops.aten.view.default(view_30, [1, 128, 1, 4])  # 9
    permute_4: "f8e8m0fnu[1, 1, 128, 4] (128, 512, 1, 128)" = torch.ops.aten.permute.default(view_31, [0, 2, 1, 3])  # 9
    view_32: "f8e8m0fnu[1, 4, 32, 4] (128, 32, 1, 128)" = torch.ops.aten.view.default(permute_4, [1, 4, 32, 4])  # 9
    transpose_4: "f8e8m0fnu[1, 32, 4, 4] (128, 1, 32, 128)" = torch.ops.aten.transpose.int(view_32, 1, 2)  # 9
    clone_4: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_4, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_4: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_4, [1, 32, 16])  # 9
    view_33: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_4, [512])  # 9
    view_34: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_29, torch.float8_e8m0fnu)  # 9
    view_35: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_33, torch.float8_e8m0fnu)  # 9
    view_36: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(getitem_5, [128, 128])  # 9
    _scaled_mm_2: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(view_36, t_5, view_34, view_35, None, None, torch.bfloat16)  # 9
    view_37: "bf16[1, 128, 128]" = torch.ops.aten.view.default(_scaled_mm_2, [1, 128, 128])  # 9
    mxfp8_quantize_2: "f8e4m3fn[0]; f8e4m3fn[128, 128] (1, 128); f8e8m0fnu[0]; f8e8m0fnu[128, 4] (1, 128)" = torch.ops.torchao.mxfp8_quantize.default(view_21, False, True, 1, 32, 'e4m3', 'floor')  # 9
    getitem_9: "f8e4m3fn[128, 128] (1, 128)" = operator.getitem(mxfp8_quantize_2, 1)  # 9
    getitem_10: "f8e8m0fnu[128, 4] (1, 128)" = operator.getitem(mxfp8_quantize_2, 3)  # 9
    t_8: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(getitem_9)  # 9
    mxfp8_quantize_3: "f8e4m3fn[0]; f8e4m3fn[128, 128] (1, 128); f8e8m0fnu[0]; f8e8m0fnu[128, 4] (1, 128)" = torch.ops.torchao.mxfp8_quantize.default(view_22, False, True, 1, 32, 'e4m3', 'floor')  # 9
    getitem_11: "f8e4m3fn[128, 128] (1, 128)" = operator.getitem(mxfp8_quantize_3, 1)  # 9
    getitem_12: "f8e8m0fnu[128, 4] (1, 128)" = operator.getitem(mxfp8_quantize_3, 3)  # 9
    t_9: "f8e4m3fn[128, 128]" = torch.ops.aten.t.default(getitem_11)  # 9
    t_10: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.t.default(t_9)  # 9
    t_11: "f8e8m0fnu[4, 128]" = torch.ops.aten.t.default(getitem_12)  # 9
    view_38: "f8e8m0fnu[128, 4] (1, 128)" = torch.ops.aten.view.default(getitem_10, [128, 4])  # 9
    view_39: "f8e8m0fnu[1, 128, 1, 4] (128, 1, 512, 128)" = torch.ops.aten.view.default(view_38, [1, 128, 1, 4])  # 9
    permute_5: "f8e8m0fnu[1, 1, 128, 4] (128, 512, 1, 128)" = torch.ops.aten.permute.default(view_39, [0, 2, 1, 3])  # 9
    view_40: "f8e8m0fnu[1, 4, 32, 4] (128, 32, 1, 128)" = torch.ops.aten.view.default(permute_5, [1, 4, 32, 4])  # 9
    transpose_5: "f8e8m0fnu[1, 32, 4, 4] (128, 1, 32, 128)" = torch.ops.aten.transpose.int(view_40, 1, 2)  # 9
    clone_5: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_5, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_5: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_5, [1, 32, 16])  # 9
    view_41: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_5, [512])  # 9
    t_12: "f8e8m0fnu[128, 4] (1, 128)" = torch.ops.aten.t.default(t_11)  # 9
    view_42: "f8e8m0fnu[128, 4] (1, 128)" = torch.ops.aten.view.default(t_12, [128, 4])  # 9
    view_43: "f8e8m0fnu[1, 128, 1, 4] (128, 1, 512, 128)" = torch.ops.aten.view.default(view_42, [1, 128, 1, 4])  # 9
    permute_6: "f8e8m0fnu[1, 1, 128, 4] (128, 512, 1, 128)" = torch.ops.aten.permute.default(view_43, [0, 2, 1, 3])  # 9
    view_44: "f8e8m0fnu[1, 4, 32, 4] (128, 32, 1, 128)" = torch.ops.aten.view.default(permute_6, [1, 4, 32, 4])  # 9
    transpose_6: "f8e8m0fnu[1, 32, 4, 4] (128, 1, 32, 128)" = torch.ops.aten.transpose.int(view_44, 1, 2)  # 9
    clone_6: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(transpose_6, memory_format=torch.contiguous_format)  # 9
    _unsafe_view_6: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten._unsafe_view.default(clone_6, [1, 32, 16])  # 9
    view_45: "f8e8m0fnu[512]" = torch.ops.aten.view.default(_unsafe_view_6, [512])  # 9
    view_46: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_41, torch.float8_e8m0fnu)  # 9
    view_47: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_45, torch.float8_e8m0fnu)  # 9
    _scaled_mm_3: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(t_8, t_10, view_46, view_47, None, None, torch.bfloat16)  # 9
    # norm (backward)
    mul_3: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(view_37, primals_1)  # 8
    mul_4: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(view_37, _to_copy_2)  # 8
    sum_1: "bf16[1, 1, 128]" = torch.ops.aten.sum.dim_IntList(mul_4, [0, 1], True)  # 8
    view_48: "bf16[128]" = torch.ops.aten.view.default(sum_1, [128])  # 8
    _to_copy_3: "f32[1, 128, 128]" = torch.ops.aten._to_copy.default(mul_3, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 7
    mul_5: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(_to_copy_3, _to_copy_1)  # 6
    mul_6: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(_to_copy_3, rsqrt_1)  # 6
    sum_2: "f32[1, 128, 1]" = torch.ops.aten.sum.dim_IntList(mul_5, [2], True)  # 6
    detach_2: "f32[1, 128, 1]" = torch.ops.aten.detach.default(detach_1)  # 5
    pow_2: "f32[1, 128, 1]" = torch.ops.aten.pow.Tensor_Scalar(detach_2, 3)  # 5
    mul_7: "f32[1, 128, 1]" = torch.ops.aten.mul.Scalar(sum_2, -0.5)  # 5
    mul_8: "f32[1, 128, 1]" = torch.ops.aten.mul.Tensor(mul_7, pow_2)  # 5
    expand_1: "f32[1, 128, 128] (128, 1, 0)" = torch.ops.aten.expand.default(mul_8, [1, 128, 128])  # 3
    div_1: "f32[1, 128, 128]" = torch.ops.aten.div.Scalar(expand_1, 128)  # 3
    pow_3: "f32[1, 128, 128]" = torch.ops.aten.pow.Tensor_Scalar(_to_copy_1, 1.0)  # 2
    mul_9: "f32[1, 128, 128]" = torch.ops.aten.mul.Scalar(pow_3, 2.0)  # 2
    mul_10: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(div_1, mul_9)  # 2
    # - (backward)
    add_2: "f32[1, 128, 128]" = torch.ops.aten.add.Tensor(mul_6, mul_10)  # 9
    # norm (backward)
    _to_copy_4: "bf16[1, 128, 128]" = torch.ops.aten._to_copy.default(add_2, device=device(type='cpu'), dtype=torch.bfloat16, layout=torch.strided)  # 1
    return [view_20, view_48, _to_copy_4, _scaled_mm_3]
