"""What torchao calls a format, and the tensors that it makes of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mxnorm_pass.extras import needs_extra
from mxnorm_pass.numerics.formats import BlockFormat

# Of MX formats torchao has matmuls for these elements, where the device has; others it emulates.
_NATIVE_ELEMENTS = frozenset({"e4m3fn", "e2m1"})


def check_torchao() -> None:
    """Raises a MissingExtraError where torchao is not installed."""
    with needs_extra("hf", "mxnorm_pass.convert"):
        import torchao  # noqa: F401


def multiplies_natively(device: torch.device) -> bool:
    """Has a device matmuls of block-scaled formats (compute capability 10.0 or newer)?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def quantize_weight(linear: nn.Linear, fmt: BlockFormat) -> None:
    """Have torchao replace a linear's weight [N, D] by its cast along D."""
    from torchao.quantization import quantize_

    quantize_(linear, torchao_config(fmt, linear.weight.device), filter_fn=_is_any)


def _is_any(module: nn.Module, name: str) -> bool:
    return True


def torchao_config(fmt: BlockFormat, device: torch.device) -> Any:
    """torchao's config that casts weights on a device, and later their activations, to a format.

    For NVFP4 without MSLK's kernel, whose bits are not those of torchao's own cast.
    """
    from torchao.prototype.mx_formats import inference_workflow as workflow

    if fmt.family == "nvfp4":
        return workflow.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.quantization.quantize_.common import KernelPreference

    elements = _elements(fmt)
    native = multiplies_natively(device) and fmt.element.name in _NATIVE_ELEMENTS
    return workflow.MXDynamicActivationMXWeightConfig(
        block_size=fmt.block_size,
        activation_dtype=elements,
        weight_dtype=elements,
        kernel_preference=KernelPreference.AUTO if native else KernelPreference.EMULATED,
        scaling_mode=ScaleCalculationMode(fmt.scale_mode),
    )


def _elements(fmt: BlockFormat) -> Any:
    from torchao.prototype.mx_formats import constants

    return {
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m3": constants.DTYPE_FP6_E2M3,
        "e3m2": constants.DTYPE_FP6_E3M2,
        "e2m1": torch.float4_e2m1fn_x2,
    }[fmt.element.name]


def is_converted(weight: Tensor) -> bool:
    """Is a weight one of the tensors that :func:`quantize_weight` makes?"""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    return isinstance(weight, (MXTensor, NVFP4Tensor)) and weight.act_quant_kwargs is not None


def config_of(weight: Any) -> Any:
    """torchao's config that casts a weight to what this converted one is."""
    from torchao.prototype.mx_formats import inference_workflow as workflow
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    activation = weight.act_quant_kwargs
    if not isinstance(weight, MXTensor):
        return workflow.NVFP4DynamicActivationNVFP4WeightConfig(
            use_triton_kernel=activation.use_triton_kernel,
            use_dynamic_per_tensor_scale=activation.use_dynamic_per_tensor_scale,
        )
    return workflow.MXDynamicActivationMXWeightConfig(
        block_size=activation.block_size,
        activation_dtype=activation.elem_dtype,
        weight_dtype=weight.elem_dtype,
        kernel_preference=weight.kernel_preference,
        scaling_mode=activation.scaling_mode,
    )
