"""The contestants of ``bench_kernels.py``: who computes an RMSNorm and the MX cast, and how.

All read bf16 ``x`` [T, D] (and ``residual`` [T, D]) and write values and scales of the format,
row-major: in MXFP8 e4m3 [T, D] and RCEIL scales [T, D/32], of elements in 4 bits values [T, D/2].
``total`` is x + residual; ``values_t``, ``scales_t`` are the cast along T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import bench_nested
import torch
from bench_nested import EPS
from torch import Tensor, nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import mxnorm_pass.ops  # noqa: F401  registers the ops
from mxnorm_pass import functional
from mxnorm_pass.functional import BlockFormat

HIGH = torch.bfloat16
# Both that widths must be multiples of, and the block in which a norm is spelled.
BLOCK = 32

Variant = Literal["norm", "residual", "both"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
FORMATS = ("mxfp8", "mxfp4", "nvfp4")
# As torchao names the elements of its MX formats.
TORCHAO_ELEMENTS = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}
Outputs = dict[str, Tensor]
NAMES: dict[Variant, tuple[str, ...]] = {
    "norm": ("values", "scales"),
    "residual": ("total", "values", "scales"),
    "both": ("values", "scales", "values_t", "scales_t"),
}

OURS = ("exact", "exact-repeat", "mxnorm", "mxnorm-fold")
TUNED = ("tuned-blocks", "tuned-flat", "tuned-multi")
COPIES = ("copy-memcpy", "copy-kernel")
CONTESTANTS = (*COPIES, "inductor", *TUNED, "nested", "liger", *OURS)
# The other tuned ones gave the same two kernels on torch 2.11 and 2.13, at twice the compile time.
DEFAULT = tuple(name for name in CONTESTANTS if name not in TUNED[1:])


@dataclass(frozen=True)
class Inputs:
    """What one call reads.

    Attributes:
        residual: None but in the residual variant.
        tensor_scale: [] float32, of NVFP4 alone.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    tensor_scale: Tensor | None = None


Call = Callable[[Inputs], Outputs]


def tensor_scale(weight: Tensor, format: str) -> Tensor | None:
    """NVFP4's, from what bounds a norm, so that nobody has to measure it; None in MX formats."""
    fmt = functional.block_format(format)
    if fmt.has_e8m0_scales:
        return None
    bound = functional.bound_of_normalized("mxnorm", 2.0, weight.numel(), fmt.block_size)
    return functional.nvfp4_norm_tensor_scale(bound, weight)


def moved_bytes(variant: Variant, tokens: int, width: int, format: str = "mxfp8") -> int:
    """Bytes read and written by whoever reads each input once and writes each output once.

    ``rho``, which only our ops write, and NVFP4's tensor scale are not counted.
    """
    elements = tokens * width
    cast = cast_bytes(tokens, width, functional.block_format(format))
    read = 2 * elements + 2 * width
    if variant == "residual":
        return read + 2 * elements + 2 * elements + cast
    return read + (2 * cast if variant == "both" else cast)


def cast_bytes(tokens: int, width: int, fmt: BlockFormat) -> int:
    """Of values and scales of [T, D]."""
    shape = (tokens, width)
    values = math.prod(fmt.values_shape(shape)) * fmt.elem_dtype.itemsize
    return values + math.prod(fmt.scales_shape(shape)) * fmt.scale_dtype.itemsize


def candidates(
    name: str, variant: Variant, tokens: int, weight: Tensor, format: str = "mxfp8"
) -> Iterator[tuple[str, Call]]:
    """The contestant's calls by how they are launched; the fastest counts.

    Raises:
        ImportError: ``name`` is "liger" and liger-kernel is not installed.
        ValueError: it has nothing to offer for the shape.
    """
    width = weight.numel()
    if name == "nested":
        yield from bench_nested.candidates(variant, format, tokens, width)
    else:
        yield "", contestant(name, variant, width, weight, format)


def contestant(
    name: str, variant: Variant, width: int, weight: Tensor, format: str = "mxfp8"
) -> Call:
    """The call of a contestant that has but one."""
    if name in OURS:
        return ours(name, variant, format)
    if name == "liger":
        return liger(variant, format)
    options: dict[str, Any] = {}
    if name in TUNED:
        options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    if name == "tuned-multi":
        options = {**options, "triton.multi_kernel": 1}
    blocked = name in ("tuned-blocks", "tuned-multi")
    norm = BlockedNorm(weight) if blocked else hf_norm(width, weight)
    return compiled(norm_cast_function(norm, variant, format), variant, options)


def compiled(function: Callable[..., Any], variant: Variant, options: dict[str, Any]) -> Call:
    fast = torch.compile(function, fullgraph=True, dynamic=False, options=options or None)

    def call(inputs: Inputs) -> Outputs:
        results = fast(inputs.x, inputs.residual, inputs.tensor_scale)
        return dict(zip(NAMES[variant], results, strict=True))

    return call


def hf_norm(width: int, weight: Tensor) -> nn.Module:
    norm: nn.Module = LlamaRMSNorm(width, EPS).to(weight)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return norm.requires_grad_(False)


class BlockedNorm(nn.Module):
    """HuggingFace's norm computed on [T, K, 32], which it also returns.

    The block maxima reduce the shape in which the norm is at hand, so that they fuse with it and
    with the cast that follows; the views back to [T, D] come last.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.view(x.shape[0], -1, BLOCK)
        high = blocks.to(torch.float32)
        rho = torch.rsqrt(high.pow(2).mean((-2, -1), keepdim=True) + EPS)
        return self.weight.view(-1, BLOCK) * (high * rho).to(x.dtype)


def torchao_cast(y: Tensor, tensor_scale: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    """torchao's cast along the last dimension: values [T, D] or [T, D/2], scales [T, K]."""
    if format == "nvfp4":
        scales, values = nvfp4_quantize(y, per_tensor_scale=tensor_scale)
    else:
        elements = TORCHAO_ELEMENTS[format]
        scales, values = to_mx(y, elements, BLOCK, ScaleCalculationMode.RCEIL)
    return values.view(y.shape[0], -1), scales.view(y.shape[0], -1)


def norm_cast_function(
    norm: nn.Module, variant: Variant, format: str = "mxfp8"
) -> Callable[..., Any]:
    def run(x: Tensor, residual: Tensor | None, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        if residual is None:
            y = norm(x)
            if variant == "norm":
                return torchao_cast(y, tensor_scale, format)
            across = y.view(x.shape).t().contiguous()
            along_d = torchao_cast(y, tensor_scale, format)
            return *along_d, *torchao_cast(across, tensor_scale, format)
        total = x + residual
        return total, *torchao_cast(norm(total), tensor_scale, format)

    return run


def liger(variant: Variant, format: str) -> Call:
    """Liger's norm, with its own fused add in front, and torchao's cast compiled on its own."""
    if variant == "both":
        raise ValueError("Liger has no kernel for both directions")
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    fast = torch.compile(torchao_cast, fullgraph=True, dynamic=False)

    def call(inputs: Inputs) -> Outputs:
        total: Outputs = {}
        if inputs.residual is None:
            y = LigerRMSNormFunction.apply(inputs.x, inputs.weight, EPS)
        else:
            y, total["total"] = LigerFusedAddRMSNormFunction.apply(
                inputs.x, inputs.residual, inputs.weight, EPS
            )
        values, scales = fast(y, inputs.tensor_scale, format)
        return {**total, "values": values, "scales": scales}

    return call


def ours(name: str, variant: Variant, format: str) -> Call:
    """Our custom op; "mxnorm-fold" leaves the gain to the weights, as the paper does."""
    estimator = "mxnorm" if name.startswith("mxnorm") else "exact"
    gain = name != "mxnorm-fold"
    spec = (EPS, estimator, 2.0, functional.block_format(format).name, HIGH, HIGH, "row-major")
    op = torch.ops.mxnorm_pass

    def call(inputs: Inputs) -> Outputs:
        weight = inputs.weight if gain else None
        options = (None, inputs.tensor_scale, *spec)
        if variant == "norm":
            out = op.norm_cast(inputs.x, weight, *options)
            return dict(zip(("values", "scales", "rho"), out, strict=True))
        if variant == "residual":
            out = op.add_norm_cast(inputs.x, inputs.residual, weight, *options)
            return dict(zip(("total", "values", "scales", "rho"), out, strict=True))
        # The cast along T feeds the weight gradient, which wants the gain in any case.
        out = op.norm_cast_both(inputs.x, inputs.weight, *options, gain)
        names = ("values", "scales", "rho", "values_t", "scales_t")
        return dict(zip(names, out, strict=True))

    return call


def reference(
    name: str, variant: Variant, inputs: Inputs, rows: int, format: str = "mxfp8"
) -> Outputs:
    """What the contestant has to compute for the first ``rows`` rows, by ``functional``."""
    estimator: Any = "mxnorm" if name.startswith("mxnorm") else "exact"
    weight = None if name == "mxnorm-fold" else inputs.weight
    x = inputs.x[:rows]
    expected: Outputs = {}
    if inputs.residual is not None:
        x = expected["total"] = x + inputs.residual[:rows]
    options: Any = {
        "eps": EPS, "estimator": estimator, "format": format, "norm_dtype": HIGH,
        "out_dtype": HIGH, "tensor_scale": inputs.tensor_scale,
    }  # fmt: skip
    names = ("values", "scales", "rho", "values_t", "scales_t")
    if variant == "both":
        gain = name != "mxnorm-fold"
        out = functional.mxnorm_cast_both(x, inputs.weight, gain_in_rows=gain, **options)
    else:
        out = functional.mxnorm_cast(x, weight, **options)
    expected |= {name: tensor for name, tensor in zip(names, out, strict=False) if name != "rho"}
    return expected
