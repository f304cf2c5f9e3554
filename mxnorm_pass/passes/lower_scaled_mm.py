"""Linears on MX operands as the matmul of chips that read values and scales: sm_100 and newer.

The calls and their arguments are those of torchao's inference linears there: ``_scaled_mm`` with
scales in the 128x4 layout, for NVFP4 with the tensor scales and then the bias applied to the
result. It has not run on such a chip. MXFP4 is widened there, too: what ``F.scaled_mm`` says of
fake tensors (torch 2.13) takes the packed elements for all, and refuses the scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.kernels import coverage
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.layout import blocked_scales
from mxnorm_pass.ops.mx_linear import MXLinearCall

Multiply = Callable[..., Tensor]
# Of the rows of values, in bytes, and of the weight's rows.
_MULTIPLE = 16


@dataclass(frozen=True)
class ScaledMM:
    """A linear that a native matmul computes.

    Attributes:
        multiply: of values and scales of both, bias and tensor scales.
    """

    linear: MXLinearCall
    multiply: Multiply

    def write(self, graph: fx.Graph, before: fx.Node, tracer: FunctionTracer) -> fx.Node:
        """The node of the result."""
        of = self.linear
        args = (of.x, of.x_scales, of.weight, of.weight_scales, of.bias)
        scales = (of.x_tensor_scale, of.weight_tensor_scale)
        y: fx.Node = tracer.graft(graph, before, self.multiply, (*args, *scales))
        return y


def scaled_mm(linear: MXLinearCall) -> ScaledMM | str:
    """How the native matmul computes it, or why it cannot."""
    x, weight = tensor_of(linear.x), tensor_of(linear.weight)
    assert x is not None and weight is not None
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    if coverage.capability(x.device) < coverage.MATMUL_CAPABILITY:
        return f"compute capability {coverage.capability(x.device)} multiplies no MX operands"
    multiply = _multiply_of(linear.x_format)
    if multiply is None or _bits(linear.x_format) != _bits(linear.weight_format):
        return f"no native matmul of {linear.x_format.name} and {linear.weight_format.name}"
    if linear.dtype != torch.bfloat16:
        return f"a result in {linear.dtype}; the native matmul writes bfloat16"
    if not all(isinstance(size, int) for size in x.shape):
        return "the number of rows is symbolic"
    if x.numel() == 0 or any(size % _MULTIPLE for size in (x.shape[-1], *weight.shape)):
        return f"x of {list(x.shape)} and weight of {list(weight.shape)} bytes"
    return ScaledMM(linear, multiply)


def _multiply_of(fmt: BlockFormat) -> Multiply | None:
    return _MULTIPLY.get(_bits(fmt))


def _bits(fmt: BlockFormat) -> tuple[str, int, bool]:
    """What a matmul knows of a format: not how scales were chosen."""
    return fmt.element.name, fmt.block_size, fmt.has_e8m0_scales


def _mxfp8(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Any, *_: Any
) -> Tensor:
    scales = (_blocked(x_scales), _blocked(weight_scales))
    y = torch._scaled_mm(_rows(x), weight.t(), *scales, bias=bias, out_dtype=torch.bfloat16)
    return _in_shape(y, x)


def _nvfp4(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Any,
    of_x: Tensor | None,
    of_weight: Tensor | None,
) -> Tensor:
    given = [scale for scale in (of_x, of_weight) if scale is not None]
    y = torch._scaled_mm(
        _rows(x).view(torch.float4_e2m1fn_x2),
        weight.view(torch.float4_e2m1fn_x2).t(),
        _blocked(x_scales),
        _blocked(weight_scales),
        bias=None if given else bias,
        out_dtype=torch.bfloat16,
    )
    if given:
        scale = given[0] * given[1] if len(given) == 2 else given[0]
        y = y * scale.to(y.dtype)
        y = y if bias is None else y + bias
    return _in_shape(y, x)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _blocked(scales: Tensor) -> Tensor:
    return blocked_scales(scales.view(torch.uint8)).view(scales.dtype)


def _in_shape(y: Tensor, x: Tensor) -> Tensor:
    return y.reshape(*x.shape[:-1], y.shape[-1])


_MULTIPLY: dict[tuple[str, int, bool], Multiply] = {
    ("e4m3fn", 32, True): _mxfp8,
    ("e2m1", 16, False): _nvfp4,
}
