"""torchao's quantisation-aware training, whose backward reads what the forward has cast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from pairwise import some
from reference import Recipe, build_llama, expected_sites, reference_of
from sm100 import believed_sm100
from torch import Tensor, nn
from torchao.prototype.mx_formats.inference_workflow import (
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
)
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from training import assert_gradients_equal, train

import mxnorm_pass
from mxnorm_pass import SkipReason, functional
from mxnorm_pass.errors import VerificationError

BF16 = torch.bfloat16


def mx(elements: torch.dtype) -> MXDynamicActivationMXWeightConfig:
    return MXDynamicActivationMXWeightConfig(
        activation_dtype=elements,
        weight_dtype=elements,
        kernel_preference=KernelPreference.EMULATED,
    )


def nvfp4(has_tensor_scale: bool) -> NVFP4DynamicActivationNVFP4WeightConfig:
    return NVFP4DynamicActivationNVFP4WeightConfig(
        use_triton_kernel=False, use_dynamic_per_tensor_scale=has_tensor_scale
    )


@dataclass(frozen=True)
class Format:
    """A format of torchao's, what ``functional`` calls it, and whether tensors are scaled."""

    config: Any
    name: str
    block_size: int = 32
    tensor_scale: Literal["dynamic", "none"] = "none"


FORMATS = {
    "mxfp8 e4m3": Format(mx(torch.float8_e4m3fn), "mxfp8 e4m3fn rceil block 32"),
    "mxfp8 e5m2": Format(mx(torch.float8_e5m2), "mxfp8 e5m2 rceil block 32"),
    "mxfp4": Format(mx(torch.float4_e2m1fn_x2), "mxfp4 e2m1 rceil block 32"),
    "nvfp4": Format(nvfp4(True), "nvfp4", 16, "dynamic"),
    "nvfp4, no tensor scale": Format(nvfp4(False), "nvfp4", 16),
}


@pytest.fixture(autouse=True)
def nvfp4_runs_on_a_cpu() -> Any:
    with believed_sm100():
        yield


def is_converted(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


class FakeQuantized(torch.autograd.Function):
    """The product of two casts; gradients are products with what was cast, in high precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fmt: Format, fused: Any) -> Tensor:
        x_cast = cast(x, fmt) if fused is None else fused
        w_cast = cast(weight, fmt)
        ctx.save_for_backward(number(*x_cast, fmt), number(*w_cast, fmt))
        *x_blocks, x_scale = x_cast
        *w_blocks, w_scale = w_cast
        y = number(*x_blocks, None, fmt) @ number(*w_blocks, None, fmt).t()
        return y if x_scale is None else y * (x_scale * w_scale).to(BF16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return grad @ weight, grad_weight, None, None


def cast(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    scale = None if fmt.tensor_scale == "none" else functional.nvfp4_tensor_scale(x)
    return (*functional.mx_cast(x, fmt.name, tensor_scale=scale), scale)


def number(values: Tensor, scales: Tensor, scale: Tensor | None, fmt: Format) -> Tensor:
    return functional.mx_dequantize(values, scales, BF16, format=fmt.name, tensor_scale=scale)


class FakeQuantizedLinear(nn.Module):
    def __init__(self, weight: nn.Parameter, fmt: Format) -> None:
        super().__init__()
        self.weight, self.format = weight, fmt

    def forward(self, x: Tensor) -> Tensor:
        fused = getattr(x, "fused", None)
        quantized = None if fused is None else fused.quantized
        x = x if fused is None else fused.output
        return FakeQuantized.apply(x, self.weight, self.format, quantized)


def reference(original: nn.Module, fmt: Format) -> nn.Module:
    recipe = Recipe(
        norm={"block_size": fmt.block_size},
        cast={"format": fmt.name},
        gain="activation",
        tensor_scale=fmt.tensor_scale,
    )
    model = reference_of(original, recipe)
    for name, module in original.named_modules():
        if is_converted(module, name):
            weight = model.get_submodule(name).weight
            model.set_submodule(name, FakeQuantizedLinear(weight, fmt))
    return model


@some(
    ["nvfp4, no tensor scale-1"],
    1,
    fmt={name: fmt for name, fmt in FORMATS.items() if fmt.tensor_scale == "none"},
    layers=[1, 2],
)
def test_logits_and_gradients_are_those_of_functional(fmt: Format, layers: int) -> None:
    model = build_llama(BF16, layers=layers)
    expected = reference(model, fmt)
    want, want_gradients = train(expected, expected)
    quantize_(model, QATConfig(fmt.config, step="prepare"), filter_fn=is_converted)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model), model)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(layers)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


def test_a_scale_of_the_tensor_that_the_backward_reads() -> None:
    """An estimate would have to replace it there, too, and does not."""
    fmt, model = FORMATS["nvfp4"], build_llama(BF16, layers=1)
    quantize_(model, QATConfig(fmt.config, step="prepare"), filter_fn=is_converted)
    want, want_gradients = train(model, model)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model), model)
    layer, last = SkipReason.CAST_ESCAPES, SkipReason.NO_MX_CAST
    assert [s.reason for s in report.sites] == [layer, layer, last], str(report)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@some(["nvfp4-1"], 1, fmt=FORMATS, layers=[1, 2])
def test_exact_changes_no_bit(fmt: Format, layers: int) -> None:
    model = build_llama(BF16, layers=layers)
    quantize_(model, QATConfig(fmt.config, step="prepare"), filter_fn=is_converted)
    want, want_gradients = train(model, model)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, estimator="exact"), model)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(layers)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@some(["nvfp4"], fmt={name: fmt for name, fmt in FORMATS.items() if "fp4" in name})
def test_verify_says_what_it_cannot_check(fmt: Format) -> None:
    model = build_llama(BF16, layers=1)
    quantize_(model, QATConfig(fmt.config, step="prepare"), filter_fn=is_converted)
    with pytest.raises(VerificationError, match="reads the bits of elements that share a byte"):
        train(compiled(model, verify=True), model)
