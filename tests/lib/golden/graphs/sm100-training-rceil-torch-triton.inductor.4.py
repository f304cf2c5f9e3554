# ruff: noqa
# fmt: off
"""sm100-training-rceil-torch-triton, decompositions: inductor."""
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
    convert_element_type_1: "f32[1, 128, 128]" = torch.ops.prims.convert_element_type.default(primals_2, torch.float32)  # 1
    pow_1: "f32[1, 128, 128]" = torch.ops.aten.pow.Tensor_Scalar(convert_element_type_1, 2)  # 2
    mean_1: "f32[1, 128, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True)  # 3
    add_1: "f32[1, 128, 1]" = torch.ops.aten.add.Tensor(mean_1, 1e-05)  # 4
    rsqrt_1: "f32[1, 128, 1]" = torch.ops.aten.rsqrt.default(add_1)  # 5
    alias_1: "f32[1, 128, 1]" = torch.ops.aten.alias.default(rsqrt_1)  # 5
    mul_1: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_1, rsqrt_1)  # 6
    convert_element_type_2: "bf16[1, 128, 128]" = torch.ops.prims.convert_element_type.default(mul_1, torch.bfloat16)  # 7
    mul_2: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(primals_1, convert_element_type_2)  # 8
    # q
    view_1: "bf16[128, 128]" = torch.ops.aten.view.default(mul_2, [-1, 128])  # 9
    view_2: "bf16[128, 4, 32]" = torch.ops.aten.view.default(view_1, [128, 4, 32])  # 9
    abs_1: "bf16[128, 4, 32]" = torch.ops.aten.abs.default(view_2)  # 9
    amax_1: "bf16[128, 4]" = torch.ops.aten.amax.default(abs_1, [-1])  # 9
    unsqueeze_1: "bf16[128, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_1, -1)  # 9
    convert_element_type_3: "f32[128, 4, 32]" = torch.ops.prims.convert_element_type.default(view_2, torch.float32)  # 9
    convert_element_type_4: "f32[128, 4, 1]" = torch.ops.prims.convert_element_type.default(unsqueeze_1, torch.float32)  # 9
    div_1: "f32[128, 4, 1]" = torch.ops.aten.div.Tensor(convert_element_type_4, 448.0)  # 9
    isnan_1: "b8[128, 4, 1]" = torch.ops.aten.isnan.default(div_1)  # 9
    log2_1: "f32[128, 4, 1]" = torch.ops.aten.log2.default(div_1)  # 9
    ceil_1: "f32[128, 4, 1]" = torch.ops.aten.ceil.default(log2_1)  # 9
    clamp_min_1: "f32[128, 4, 1]" = torch.ops.aten.clamp_min.default(ceil_1, -127)  # 9
    clamp_max_1: "f32[128, 4, 1]" = torch.ops.aten.clamp_max.default(clamp_min_1, 127)  # 9
    add_2: "f32[128, 4, 1]" = torch.ops.aten.add.Tensor(clamp_max_1, 127)  # 9
    convert_element_type_5: "u8[128, 4, 1]" = torch.ops.prims.convert_element_type.default(add_2, torch.uint8)  # 9
    scalar_tensor_1: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_1: "u8[128, 4, 1]" = torch.ops.aten.where.self(isnan_1, scalar_tensor_1, convert_element_type_5)  # 9
    eq_1: "b8[128, 4, 1]" = torch.ops.aten.eq.Scalar(where_1, 0)  # 9
    convert_element_type_6: "f32[128, 4, 1]" = torch.ops.prims.convert_element_type.default(where_1, torch.float32)  # 9
    sub_1: "f32[128, 4, 1]" = torch.ops.aten.sub.Tensor(127, convert_element_type_6)  # 9
    exp2_1: "f32[128, 4, 1]" = torch.ops.aten.exp2.default(sub_1)  # 9
    scalar_tensor_2: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_2: "f32[128, 4, 1]" = torch.ops.aten.where.self(eq_1, scalar_tensor_2, exp2_1)  # 9
    mul_3: "f32[128, 4, 32]" = torch.ops.aten.mul.Tensor(convert_element_type_3, where_2)  # 9
    clamp_min_2: "f32[128, 4, 32]" = torch.ops.aten.clamp_min.default(mul_3, -448.0)  # 9
    clamp_max_2: "f32[128, 4, 32]" = torch.ops.aten.clamp_max.default(clamp_min_2, 448.0)  # 9
    convert_element_type_7: "f8e4m3fn[128, 4, 32]" = torch.ops.prims.convert_element_type.default(clamp_max_2, torch.float8_e4m3fn)  # 9
    view_3: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(convert_element_type_7, [128, 128])  # 9
    view_4: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(where_1, torch.float8_e8m0fnu)  # 9
    alias_2: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.alias.default(view_4)  # 9
    squeeze_1: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(alias_2, -1)  # 9
    view_5: "bf16[128, 4, 32]" = torch.ops.aten.view.default(primals_3, [128, 4, 32])  # 9
    abs_2: "bf16[128, 4, 32]" = torch.ops.aten.abs.default(view_5)  # 9
    amax_2: "bf16[128, 4]" = torch.ops.aten.amax.default(abs_2, [-1])  # 9
    unsqueeze_2: "bf16[128, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_2, -1)  # 9
    convert_element_type_8: "f32[128, 4, 32]" = torch.ops.prims.convert_element_type.default(view_5, torch.float32)  # 9
    convert_element_type_9: "f32[128, 4, 1]" = torch.ops.prims.convert_element_type.default(unsqueeze_2, torch.float32)  # 9
    div_2: "f32[128, 4, 1]" = torch.ops.aten.div.Tensor(convert_element_type_9, 448.0)  # 9
    isnan_2: "b8[128, 4, 1]" = torch.ops.aten.isnan.default(div_2)  # 9
    log2_2: "f32[128, 4, 1]" = torch.ops.aten.log2.default(div_2)  # 9
    ceil_2: "f32[128, 4, 1]" = torch.ops.aten.ceil.default(log2_2)  # 9
    clamp_min_3: "f32[128, 4, 1]" = torch.ops.aten.clamp_min.default(ceil_2, -127)  # 9
    clamp_max_3: "f32[128, 4, 1]" = torch.ops.aten.clamp_max.default(clamp_min_3, 127)  # 9
    add_3: "f32[128, 4, 1]" = torch.ops.aten.add.Tensor(clamp_max_3, 127)  # 9
    convert_element_type_10: "u8[128, 4, 1]" = torch.ops.prims.convert_element_type.default(add_3, torch.uint8)  # 9
    scalar_tensor_3: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_3: "u8[128, 4, 1]" = torch.ops.aten.where.self(isnan_2, scalar_tensor_3, convert_element_type_10)  # 9
    eq_2: "b8[128, 4, 1]" = torch.ops.aten.eq.Scalar(where_3, 0)  # 9
    convert_element_type_11: "f32[128, 4, 1]" = torch.ops.prims.convert_element_type.default(where_3, torch.float32)  # 9
    sub_2: "f32[128, 4, 1]" = torch.ops.aten.sub.Tensor(127, convert_element_type_11)  # 9
    exp2_2: "f32[128, 4, 1]" = torch.ops.aten.exp2.default(sub_2)  # 9
    scalar_tensor_4: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_4: "f32[128, 4, 1]" = torch.ops.aten.where.self(eq_2, scalar_tensor_4, exp2_2)  # 9
    mul_4: "f32[128, 4, 32]" = torch.ops.aten.mul.Tensor(convert_element_type_8, where_4)  # 9
    clamp_min_4: "f32[128, 4, 32]" = torch.ops.aten.clamp_min.default(mul_4, -448.0)  # 9
    clamp_max_4: "f32[128, 4, 32]" = torch.ops.aten.clamp_max.default(clamp_min_4, 448.0)  # 9
    convert_element_type_12: "f8e4m3fn[128, 4, 32]" = torch.ops.prims.convert_element_type.default(clamp_max_4, torch.float8_e4m3fn)  # 9
    view_6: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(convert_element_type_12, [128, 128])  # 9
    view_7: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(where_3, torch.float8_e8m0fnu)  # 9
    alias_3: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.alias.default(view_7)  # 9
    squeeze_2: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(alias_3, -1)  # 9
    permute_1: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(view_6, [1, 0])  # 9
    permute_2: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.permute.default(squeeze_2, [1, 0])  # 9
    view_8: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(squeeze_1, [128, 4])  # 9
    view_9: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_8, [1, 128, 1, 4])  # 9
    permute_3: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_9, [0, 2, 1, 3])  # 9
    view_10: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_3, [-1, 4, 32, 4])  # 9
    permute_4: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_10, [0, 2, 1, 3])  # 9
    clone_1: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_4, memory_format=torch.contiguous_format)  # 9
    view_11: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_1, [1, 32, 16])  # 9
    view_12: "f8e8m0fnu[512]" = torch.ops.aten.view.default(view_11, [512])  # 9
    permute_5: "f8e8m0fnu[128, 4]" = torch.ops.aten.permute.default(permute_2, [1, 0])  # 9
    view_13: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(permute_5, [128, 4])  # 9
    view_14: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_13, [1, 128, 1, 4])  # 9
    permute_6: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_14, [0, 2, 1, 3])  # 9
    view_15: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_6, [-1, 4, 32, 4])  # 9
    permute_7: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_15, [0, 2, 1, 3])  # 9
    clone_2: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_7, memory_format=torch.contiguous_format)  # 9
    view_16: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_2, [1, 32, 16])  # 9
    view_17: "f8e8m0fnu[512]" = torch.ops.aten.view.default(view_16, [512])  # 9
    view_18: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_12, torch.float8_e8m0fnu)  # 9
    view_19: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_17, torch.float8_e8m0fnu)  # 9
    _scaled_mm_1: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(view_3, permute_1, view_18, view_19, None, None, torch.bfloat16)  # 9
    view_20: "bf16[1, 128, 128]" = torch.ops.aten.view.default(_scaled_mm_1, [1, 128, 128])  # 9
    # q (backward)
    view_21: "bf16[128, 128]" = torch.ops.aten.view.default(tangents_1, [-1, 128])  # 9
    view_22: "bf16[128, 128]" = torch.ops.aten.view.default(mul_2, [-1, 128])  # 9
    view_23: "bf16[128, 4, 32]" = torch.ops.aten.view.default(view_21, [128, 4, 32])  # 9
    abs_3: "bf16[128, 4, 32]" = torch.ops.aten.abs.default(view_23)  # 9
    amax_3: "bf16[128, 4]" = torch.ops.aten.amax.default(abs_3, [-1])  # 9
    unsqueeze_3: "bf16[128, 4, 1]" = torch.ops.aten.unsqueeze.default(amax_3, -1)  # 9
    convert_element_type_13: "f32[128, 4, 32]" = torch.ops.prims.convert_element_type.default(view_23, torch.float32)  # 9
    convert_element_type_14: "f32[128, 4, 1]" = torch.ops.prims.convert_element_type.default(unsqueeze_3, torch.float32)  # 9
    div_3: "f32[128, 4, 1]" = torch.ops.aten.div.Tensor(convert_element_type_14, 448.0)  # 9
    isnan_3: "b8[128, 4, 1]" = torch.ops.aten.isnan.default(div_3)  # 9
    log2_3: "f32[128, 4, 1]" = torch.ops.aten.log2.default(div_3)  # 9
    ceil_3: "f32[128, 4, 1]" = torch.ops.aten.ceil.default(log2_3)  # 9
    clamp_min_5: "f32[128, 4, 1]" = torch.ops.aten.clamp_min.default(ceil_3, -127)  # 9
    clamp_max_5: "f32[128, 4, 1]" = torch.ops.aten.clamp_max.default(clamp_min_5, 127)  # 9
    add_4: "f32[128, 4, 1]" = torch.ops.aten.add.Tensor(clamp_max_5, 127)  # 9
    convert_element_type_15: "u8[128, 4, 1]" = torch.ops.prims.convert_element_type.default(add_4, torch.uint8)  # 9
    scalar_tensor_5: "u8[]" = torch.ops.aten.scalar_tensor.default(255, device=device(type='cpu'), dtype=torch.uint8, layout=torch.strided)  # 9
    where_5: "u8[128, 4, 1]" = torch.ops.aten.where.self(isnan_3, scalar_tensor_5, convert_element_type_15)  # 9
    eq_3: "b8[128, 4, 1]" = torch.ops.aten.eq.Scalar(where_5, 0)  # 9
    convert_element_type_16: "f32[128, 4, 1]" = torch.ops.prims.convert_element_type.default(where_5, torch.float32)  # 9
    sub_3: "f32[128, 4, 1]" = torch.ops.aten.sub.Tensor(127, convert_element_type_16)  # 9
    exp2_3: "f32[128, 4, 1]" = torch.ops.aten.exp2.default(sub_3)  # 9
    scalar_tensor_6: "f32[]" = torch.ops.aten.scalar_tensor.default(1.0, device=device(type='cpu'), dtype=torch.float32, layout=torch.strided)  # 9
    where_6: "f32[128, 4, 1]" = torch.ops.aten.where.self(eq_3, scalar_tensor_6, exp2_3)  # 9
    mul_5: "f32[128, 4, 32]" = torch.ops.aten.mul.Tensor(convert_element_type_13, where_6)  # 9
    clamp_min_6: "f32[128, 4, 32]" = torch.ops.aten.clamp_min.default(mul_5, -448.0)  # 9
    clamp_max_6: "f32[128, 4, 32]" = torch.ops.aten.clamp_max.default(clamp_min_6, 448.0)  # 9
    convert_element_type_17: "f8e4m3fn[128, 4, 32]" = torch.ops.prims.convert_element_type.default(clamp_max_6, torch.float8_e4m3fn)  # 9
    view_24: "f8e4m3fn[128, 128]" = torch.ops.aten.view.default(convert_element_type_17, [128, 128])  # 9
    view_25: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(where_5, torch.float8_e8m0fnu)  # 9
    alias_4: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.alias.default(view_25)  # 9
    squeeze_3: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(alias_4, -1)  # 9
    empty_1: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_2: "u8[128, 4, 1]" = torch.ops.aten.empty.memory_format([128, 4, 1], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_1 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim1_kernel'), kwargs={'x_ptr': primals_3, 'output_col_major_ptr': empty_1, 'col_scale_ptr': empty_2, 'n_rows': 128, 'n_cols': 128, 'INNER_BLOCK_SIZE': 32, 'SCALING_MODE': 'rceil'}, tensors_to_clone=['output_col_major_ptr', 'col_scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_1: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_1, 'output_col_major_ptr')  # 9
    getitem_2: "u8[128, 4, 1]" = operator.getitem(triton_kernel_wrapper_functional_1, 'col_scale_ptr')  # 9
    permute_8: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(getitem_1, [1, 0])  # 9
    permute_9: "f8e4m3fn[128, 128]" = torch.ops.aten.permute.default(permute_8, [1, 0])  # 9
    permute_10: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(permute_9, [1, 0])  # 9
    view_26: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(squeeze_3, [128, 4])  # 9
    view_27: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_26, [1, 128, 1, 4])  # 9
    permute_11: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_27, [0, 2, 1, 3])  # 9
    view_28: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_11, [-1, 4, 32, 4])  # 9
    permute_12: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_28, [0, 2, 1, 3])  # 9
    clone_3: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_12, memory_format=torch.contiguous_format)  # 9
    view_29: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_3, [1, 32, 16])  # 9
    view_30: "f8e8m0fnu[512]" = torch.ops.aten.view.default(view_29, [512])  # 9
    view_31: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(getitem_2, torch.float8_e8m0fnu)  # 9
    squeeze_4: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(view_31, -1)  # 9
    permute_13: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.permute.default(squeeze_4, [1, 0])  # 9
    permute_14: "f8e8m0fnu[128, 4]" = torch.ops.aten.permute.default(permute_13, [1, 0])  # 9
    view_32: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(permute_14, [128, 4])  # 9
    view_33: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_32, [1, 128, 1, 4])  # 9
    permute_15: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_33, [0, 2, 1, 3])  # 9
    view_34: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_15, [-1, 4, 32, 4])  # 9
    permute_16: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_34, [0, 2, 1, 3])  # 9
    clone_4: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_16, memory_format=torch.contiguous_format)  # 9
    view_35: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_4, [1, 32, 16])  # 9
    view_36: "f8e8m0fnu[512]" = torch.ops.aten.view.default(view_35, [512])  # 9
    view_37: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_30, torch.float8_e8m0fnu)  # 9
    view_38: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_36, torch.float8_e8m0fnu)  # 9
    _scaled_mm_2: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(view_24, permute_10, view_37, view_38, None, None, torch.bfloat16)  # 9
    view_39: "bf16[1, 128, 128]" = torch.ops.aten.view.default(_scaled_mm_2, [1, 128, 128])  # 9
    empty_3: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_4: "u8[128, 4, 1]" = torch.ops.aten.empty.memory_format([128, 4, 1], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_2 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim1_kernel'), kwargs={'x_ptr': view_21, 'output_col_major_ptr': empty_3, 'col_scale_ptr': empty_4, 'n_rows': 128, 'n_cols': 128, 'INNER_BLOCK_SIZE': 32, 'SCALING_MODE': 'rceil'}, tensors_to_clone=['output_col_major_ptr', 'col_scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_3: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_2, 'output_col_major_ptr')  # 9
    getitem_4: "u8[128, 4, 1]" = operator.getitem(triton_kernel_wrapper_functional_2, 'col_scale_ptr')  # 9
    empty_5: "f8e4m3fn[128, 128]" = torch.ops.aten.empty.memory_format([128, 128], device=device(type='cpu'), dtype=torch.float8_e4m3fn, pin_memory=False)  # 9
    empty_6: "u8[128, 4, 1]" = torch.ops.aten.empty.memory_format([128, 4, 1], device=device(type='cpu'), dtype=torch.uint8, pin_memory=False)  # 9
    triton_kernel_wrapper_functional_3 = torch.ops.higher_order.triton_kernel_wrapper_functional(constant_args_idx=constants({}), grid=[(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)], kernel_idx=kernel('to_mxfp8_dim1_kernel'), kwargs={'x_ptr': view_22, 'output_col_major_ptr': empty_5, 'col_scale_ptr': empty_6, 'n_rows': 128, 'n_cols': 128, 'INNER_BLOCK_SIZE': 32, 'SCALING_MODE': 'rceil'}, tensors_to_clone=['output_col_major_ptr', 'col_scale_ptr'], tma_descriptor_metadata={})  # 9
    getitem_5: "f8e4m3fn[128, 128]" = operator.getitem(triton_kernel_wrapper_functional_3, 'output_col_major_ptr')  # 9
    getitem_6: "u8[128, 4, 1]" = operator.getitem(triton_kernel_wrapper_functional_3, 'col_scale_ptr')  # 9
    permute_17: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(getitem_5, [1, 0])  # 9
    permute_18: "f8e4m3fn[128, 128]" = torch.ops.aten.permute.default(permute_17, [1, 0])  # 9
    permute_19: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(permute_18, [1, 0])  # 9
    view_40: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(getitem_4, torch.float8_e8m0fnu)  # 9
    squeeze_5: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(view_40, -1)  # 9
    view_41: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(squeeze_5, [128, 4])  # 9
    view_42: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_41, [1, 128, 1, 4])  # 9
    permute_20: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_42, [0, 2, 1, 3])  # 9
    view_43: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_20, [-1, 4, 32, 4])  # 9
    permute_21: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_43, [0, 2, 1, 3])  # 9
    clone_5: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_21, memory_format=torch.contiguous_format)  # 9
    view_44: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_5, [1, 32, 16])  # 9
    view_45: "f8e8m0fnu[512]" = torch.ops.aten.view.default(view_44, [512])  # 9
    view_46: "f8e8m0fnu[128, 4, 1]" = torch.ops.aten.view.dtype(getitem_6, torch.float8_e8m0fnu)  # 9
    squeeze_6: "f8e8m0fnu[128, 4]" = torch.ops.aten.squeeze.dim(view_46, -1)  # 9
    permute_22: "f8e8m0fnu[4, 128] (1, 4)" = torch.ops.aten.permute.default(squeeze_6, [1, 0])  # 9
    permute_23: "f8e8m0fnu[128, 4]" = torch.ops.aten.permute.default(permute_22, [1, 0])  # 9
    view_47: "f8e8m0fnu[128, 4]" = torch.ops.aten.view.default(permute_23, [128, 4])  # 9
    view_48: "f8e8m0fnu[1, 128, 1, 4]" = torch.ops.aten.view.default(view_47, [1, 128, 1, 4])  # 9
    permute_24: "f8e8m0fnu[1, 1, 128, 4]" = torch.ops.aten.permute.default(view_48, [0, 2, 1, 3])  # 9
    view_49: "f8e8m0fnu[1, 4, 32, 4]" = torch.ops.aten.view.default(permute_24, [-1, 4, 32, 4])  # 9
    permute_25: "f8e8m0fnu[1, 32, 4, 4] (512, 4, 128, 1)" = torch.ops.aten.permute.default(view_49, [0, 2, 1, 3])  # 9
    clone_6: "f8e8m0fnu[1, 32, 4, 4]" = torch.ops.aten.clone.default(permute_25, memory_format=torch.contiguous_format)  # 9
    view_50: "f8e8m0fnu[1, 32, 16]" = torch.ops.aten.view.default(clone_6, [1, 32, 16])  # 9
    view_51: "f8e8m0fnu[512]" = torch.ops.aten.view.default(view_50, [512])  # 9
    view_52: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_45, torch.float8_e8m0fnu)  # 9
    view_53: "f8e8m0fnu[512]" = torch.ops.aten.view.dtype(view_51, torch.float8_e8m0fnu)  # 9
    permute_26: "f8e4m3fn[128, 128] (1, 128)" = torch.ops.aten.permute.default(getitem_3, [1, 0])  # 9
    permute_27: "f8e4m3fn[128, 128]" = torch.ops.aten.permute.default(permute_26, [1, 0])  # 9
    _scaled_mm_3: "bf16[128, 128]" = torch.ops.aten._scaled_mm.default(permute_27, permute_19, view_52, view_53, None, None, torch.bfloat16)  # 9
    # norm (backward)
    mul_6: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(view_39, primals_1)  # 8
    mul_7: "bf16[1, 128, 128]" = torch.ops.aten.mul.Tensor(view_39, convert_element_type_2)  # 8
    sum_1: "bf16[1, 1, 128]" = torch.ops.aten.sum.dim_IntList(mul_7, [0, 1], True)  # 8
    view_54: "bf16[128]" = torch.ops.aten.view.default(sum_1, [128])  # 8
    convert_element_type_18: "f32[1, 128, 128]" = torch.ops.prims.convert_element_type.default(mul_6, torch.float32)  # 7
    mul_8: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_18, convert_element_type_1)  # 6
    mul_9: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(convert_element_type_18, rsqrt_1)  # 6
    sum_2: "f32[1, 128, 1]" = torch.ops.aten.sum.dim_IntList(mul_8, [2], True)  # 6
    alias_5: "f32[1, 128, 1]" = torch.ops.aten.alias.default(alias_1)  # 5
    pow_2: "f32[1, 128, 1]" = torch.ops.aten.pow.Tensor_Scalar(alias_5, 3)  # 5
    mul_10: "f32[1, 128, 1]" = torch.ops.aten.mul.Scalar(sum_2, -0.5)  # 5
    mul_11: "f32[1, 128, 1]" = torch.ops.aten.mul.Tensor(mul_10, pow_2)  # 5
    expand_1: "f32[1, 128, 128] (128, 1, 0)" = torch.ops.aten.expand.default(mul_11, [1, 128, 128])  # 3
    div_4: "f32[1, 128, 128]" = torch.ops.aten.div.Scalar(expand_1, 128)  # 3
    pow_3: "f32[1, 128, 128]" = torch.ops.aten.pow.Tensor_Scalar(convert_element_type_1, 1.0)  # 2
    mul_12: "f32[1, 128, 128]" = torch.ops.aten.mul.Scalar(pow_3, 2.0)  # 2
    mul_13: "f32[1, 128, 128]" = torch.ops.aten.mul.Tensor(div_4, mul_12)  # 2
    # - (backward)
    add_5: "f32[1, 128, 128]" = torch.ops.aten.add.Tensor(mul_9, mul_13)  # 9
    # norm (backward)
    convert_element_type_19: "bf16[1, 128, 128]" = torch.ops.prims.convert_element_type.default(add_5, torch.bfloat16)  # 1
    return [view_20, view_54, convert_element_type_19, _scaled_mm_3]
