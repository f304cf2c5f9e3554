"""MX casts of high-precision tensors, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxnorm_pass.numerics.e8m0 import e8m0_exponent, e8m0_to_float, rceil_reciprocal
from mxnorm_pass.numerics.formats import (
    F32_MANTISSA_BITS,
    F32_SMALLEST_NORMAL,
    MX_BLOCK_SIZE,
    BlockFormat,
    block_format,
)
from mxnorm_pass.numerics.layout import block_size_of, blocked_scales_shape
from mxnorm_pass.numerics.rms import blocks


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in a block format.

    Attributes:
        values: [..., D], the elements.
        scales: [..., K], row-major, or in another layout where a function says so.
        tensor_scale: [] float32, of formats with two levels of scaling; None of others.
    """

    values: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """values * scales in ``dtype``, of scales that are known to be row-major."""
        block_size = block_size_of(self.values.shape, self.scales.shape)
        in_blocks = self.values.to(dtype).reshape(*self.scales.shape, block_size)
        scale = e8m0_to_float(self.scales).to(dtype).unsqueeze(-1)
        return (in_blocks * scale).reshape(self.values.shape)


@torch.no_grad()
def quantize(x: Tensor, fmt: BlockFormat) -> Quantized:
    """Cast [..., D], float32, bfloat16 or float16, along the last dimension."""
    in_blocks = blocks(x, fmt.block_size)
    absmax = in_blocks.abs().amax(-1, keepdim=True).to(torch.float32)
    return cast_blocks(in_blocks.to(torch.float32), absmax, fmt)


def cast_blocks(in_blocks: Tensor, absmax: Tensor, fmt: BlockFormat) -> Quantized:
    """Cast blocks [..., K, B] in float32 under the scales that their absmaxes [..., K, 1] give."""
    exponent = e8m0_exponent(absmax, fmt)
    values = cast_elements(in_blocks, exponent, fmt).flatten(-2)
    return Quantized(values, exponent.squeeze(-1).view(fmt.scale_dtype))


def cast_elements(x: Tensor, exponent: Tensor, fmt: BlockFormat) -> Tensor:
    """Divide by the shared scale, saturate, and round to the element type.

    Args:
        x: float32, blocks along the last dimension.
        exponent: uint8 biased E8M0 exponents, broadcastable to ``x``.
        fmt: its scale mode made ``exponent`` (it decides how the smallest and largest scales,
            which float32 cannot divide by exactly, are treated).

    Returns:
        Elements of ``x``'s shape. Finite values saturate; NaN stays NaN.
    """
    limit = fmt.element.max
    if fmt.scale_mode in ("rceil", "rceil-log2"):
        scaled = x * rceil_reciprocal(exponent)
    else:
        scale = (exponent.to(torch.int32) << F32_MANTISSA_BITS).view(torch.float32)
        scaled = x / scale.clamp(min=F32_SMALLEST_NORMAL)
    # Clamp first: float32 -> float8_e4m3fn overflows to NaN on CPU before torch 2.13.
    return scaled.clamp(-limit, limit).to(fmt.elem_dtype)


def mx_cast(x: Tensor, format: BlockFormat | str = "mxfp8") -> tuple[Tensor, Tensor]:
    """Cast to an MX format along the last dimension.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        format: a :class:`BlockFormat` or the name of one, see :func:`block_format`.

    Returns:
        values [..., D] of the format's ``elem_dtype`` and scales [..., K] of its ``scale_dtype``.
        Equal to torchao's ``to_mx`` bit for bit, but for the sign of NaN; its RCEIL of float32
        is "rceil-log2" (see :func:`mxnorm_pass.numerics.e8m0.e8m0_exponent`).

    Raises:
        ValueError: no such format, or D is not divisible by its block size.
    """
    quantized = quantize(x, block_format(format))
    return quantized.values, quantized.scales


@torch.no_grad()
def mx_dequantize(
    values: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int | None = None,
) -> Tensor:
    """values * scales in ``dtype``.

    Args:
        values: [..., D], float8.
        scales: [..., K], row-major, ``torch.float8_e8m0fnu``.
        dtype: bfloat16 holds every e4m3 value times a power of two exactly, within its range.
        block_size: None for D / K.

    Returns:
        [..., D] of ``dtype``; blocks whose scale is NaN are NaN.

    Raises:
        ValueError: the shapes do not belong together, or not to ``block_size``; or that is None
            and ``scales`` may as well be in the 128x4 layout, for blocks of 32.
    """
    inferred = block_size_of(values.shape, scales.shape)
    if block_size is None and inferred != MX_BLOCK_SIZE:
        in_mx_blocks = (*values.shape[:-1], values.shape[-1] // MX_BLOCK_SIZE)
        if scales.shape == blocked_scales_shape(in_mx_blocks):
            raise ValueError(
                f"scales of shape {tuple(scales.shape)} are row-major for blocks of {inferred}, or "
                f"in the 128x4 layout for blocks of {MX_BLOCK_SIZE}, which cannot be read here; "
                f"block_size={inferred} says that they are the first"
            )
    if block_size is not None and inferred != block_size:
        raise ValueError(f"block_size is {block_size}, but scales has one per {inferred} values")
    return Quantized(values, scales).dequantize(dtype)
