"""The contestants of ``bench_kernels.py``: who computes an RMSNorm and the MX cast, and how.

All read bf16 ``x`` [T, D] (and ``residual`` [T, D]) and write e4m3 values [T, D] and RCEIL scales
[T, D/32], row-major. ``total`` is x + residual; ``values_t``, ``scales_t`` are the cast along T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import mxnorm_pass.ops  # noqa: F401  registers the ops
from mxnorm_pass import functional

BLOCK = 32
EPS = 1e-5
ELEM = torch.float8_e4m3fn
FORMAT = "mxfp8 e4m3fn rceil block 32"
HIGH = torch.bfloat16

Variant = Literal["norm", "residual", "both"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Outputs = dict[str, Tensor]
NAMES: dict[Variant, tuple[str, ...]] = {
    "norm": ("values", "scales"),
    "residual": ("total", "values", "scales"),
    "both": ("values", "scales", "values_t", "scales_t"),
}

OURS = ("exact", "exact-repeat", "mxnorm", "mxnorm-fold")
TUNED = ("tuned-blocks", "tuned-flat", "tuned-multi")
COPIES = ("copy-memcpy", "copy-kernel")
CONTESTANTS = (*COPIES, "inductor", *TUNED, "liger", *OURS)
# The other tuned ones gave the same two kernels on torch 2.11 and 2.13, at twice the compile time.
DEFAULT = tuple(name for name in CONTESTANTS if name not in TUNED[1:])


@dataclass(frozen=True)
class Inputs:
    """What one call reads; ``residual`` is None but in the residual variant."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor


Call = Callable[[Inputs], Outputs]


def moved_bytes(variant: Variant, tokens: int, width: int) -> int:
    """Bytes read and written by whoever reads each input once and writes each output once.

    ``rho``, which only our ops write, is not counted.
    """
    elements = tokens * width
    cast = elements + elements // BLOCK
    read = 2 * elements + 2 * width
    if variant == "residual":
        return read + 2 * elements + 2 * elements + cast
    return read + (2 * cast if variant == "both" else cast)


def contestant(name: str, variant: Variant, width: int, weight: Tensor) -> Call:
    """The named contestant's call.

    Raises:
        ImportError: ``name`` is "liger" and liger-kernel is not installed.
        ValueError: it has nothing to offer for the variant.
    """
    if name in OURS:
        return ours(name, variant)
    if name == "liger":
        return liger(variant)
    options: dict[str, Any] = {}
    if name in TUNED:
        options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    if name == "tuned-multi":
        options = {**options, "triton.multi_kernel": 1}
    blocked = name in ("tuned-blocks", "tuned-multi")
    norm = BlockedNorm(weight) if blocked else hf_norm(width, weight)
    return compiled(norm_cast_function(norm, variant), variant, options)


def compiled(function: Callable[..., Any], variant: Variant, options: dict[str, Any]) -> Call:
    fast = torch.compile(function, fullgraph=True, dynamic=False, options=options or None)

    def call(inputs: Inputs) -> Outputs:
        return dict(zip(NAMES[variant], fast(inputs.x, inputs.residual), strict=True))

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


def torchao_cast(y: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's cast along the last dimension, results as [T, D] and [T, K]."""
    scales, values = to_mx(y, ELEM, BLOCK, ScaleCalculationMode.RCEIL)
    return values.view(y.shape[0], -1), scales.view(y.shape[0], -1)


def norm_cast_function(norm: nn.Module, variant: Variant) -> Callable[..., Any]:
    def run(x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        if residual is None:
            y = norm(x)
            if variant == "norm":
                return torchao_cast(y)
            across = y.view(x.shape).t().contiguous()
            return *torchao_cast(y), *torchao_cast(across)
        total = x + residual
        return total, *torchao_cast(norm(total))

    return run


def liger(variant: Variant) -> Call:
    """Liger's norm, with its own fused add in front, and torchao's cast compiled on its own."""
    if variant == "both":
        raise ValueError("Liger has no kernel for both directions")
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    cast = torch.compile(torchao_cast, fullgraph=True, dynamic=False)

    def call(inputs: Inputs) -> Outputs:
        if inputs.residual is None:
            values, scales = cast(LigerRMSNormFunction.apply(inputs.x, inputs.weight, EPS))
            return {"values": values, "scales": scales}
        y, total = LigerFusedAddRMSNormFunction.apply(inputs.x, inputs.residual, inputs.weight, EPS)
        values, scales = cast(y)
        return {"total": total, "values": values, "scales": scales}

    return call


def ours(name: str, variant: Variant) -> Call:
    """Our custom op; "mxnorm-fold" leaves the gain to the weights, as the paper does."""
    estimator = "mxnorm" if name.startswith("mxnorm") else "exact"
    gain = name != "mxnorm-fold"
    options = (None, None, EPS, estimator, 2.0, FORMAT, HIGH, HIGH, "row-major")
    op = torch.ops.mxnorm_pass

    def call(inputs: Inputs) -> Outputs:
        weight = inputs.weight if gain else None
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


def reference(name: str, variant: Variant, inputs: Inputs, rows: int) -> Outputs:
    """What the contestant has to compute for the first ``rows`` rows, by ``functional``."""
    estimator: Any = "mxnorm" if name.startswith("mxnorm") else "exact"
    weight = None if name == "mxnorm-fold" else inputs.weight
    x = inputs.x[:rows]
    expected: Outputs = {}
    if inputs.residual is not None:
        x = expected["total"] = x + inputs.residual[:rows]
    options: Any = {
        "eps": EPS, "estimator": estimator, "format": FORMAT, "norm_dtype": HIGH,
        "out_dtype": HIGH,
    }  # fmt: skip
    names = ("values", "scales", "rho", "values_t", "scales_t")
    if variant == "both":
        gain = name != "mxnorm-fold"
        out = functional.mxnorm_cast_both(x, inputs.weight, gain_in_rows=gain, **options)
    else:
        out = functional.mxnorm_cast(x, weight, **options)
    expected |= {name: tensor for name, tensor in zip(names, out, strict=False) if name != "rho"}
    return expected
