"""MX casts of high-precision tensors, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from mxnorm_pass.numerics.e8m0 import e8m0_exponent, e8m0_to_float, rceil_reciprocal
from mxnorm_pass.numerics.formats import (
    F32_MANTISSA_BITS,
    F32_SMALLEST_NORMAL,
    MX_BLOCK_SIZE,
    CastMode,
    element_format,
)
from mxnorm_pass.numerics.layout import block_size_of, blocked_scales_shape
from mxnorm_pass.numerics.rms import blocks


def cast_elements(
    x: Tensor, exponent: Tensor, elem_dtype: torch.dtype, scale_mode: CastMode
) -> Tensor:
    """Divide by the shared scale, saturate, and round to the element type.

    Args:
        x: float32, blocks along the last dimension.
        exponent: uint8 biased E8M0 exponents, broadcastable to ``x``.
        elem_dtype: target element type.
        scale_mode: the mode that made ``exponent`` (it decides how the smallest and largest
            scales, which float32 cannot divide by exactly, are treated).

    Returns:
        ``elem_dtype`` tensor of ``x``'s shape. Finite values saturate; NaN stays NaN.
    """
    limit = element_format(elem_dtype).max
    if scale_mode in ("rceil", "rceil-log2"):
        scaled = x * rceil_reciprocal(exponent)
    else:
        scale = (exponent.to(torch.int32) << F32_MANTISSA_BITS).view(torch.float32)
        scaled = x / scale.clamp(min=F32_SMALLEST_NORMAL)
    # Clamp first: float32 -> float8_e4m3fn overflows to NaN on CPU before torch 2.13.
    return scaled.clamp(-limit, limit).to(elem_dtype)


def dequantize_blocks(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``functional.mx_dequantize`` of scales that are known to be row-major."""
    blocks = values.to(dtype).reshape(*scales.shape, block_size_of(values.shape, scales.shape))
    return (blocks * e8m0_to_float(scales).to(dtype).unsqueeze(-1)).reshape(values.shape)


@torch.no_grad()
def mx_cast(
    x: Tensor,
    *,
    elem_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_mode: CastMode = "rceil",
    block_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Cast to an MX format along the last dimension.

    Args:
        x: [..., D], float32, bfloat16 or float16.

    Returns:
        values [..., D] of ``elem_dtype`` and scales [..., K] of ``torch.float8_e8m0fnu``.
        Equal to torchao's ``to_mx`` bit for bit, but for the sign of NaN; its RCEIL of float32
        is "rceil-log2" (see :func:`mxnorm_pass.numerics.e8m0.e8m0_exponent`).
    """
    in_blocks = blocks(x, block_size)
    absmax = in_blocks.abs().amax(-1, keepdim=True).to(torch.float32)
    return cast_blocks(x, in_blocks.to(torch.float32), absmax, elem_dtype, scale_mode)


def cast_blocks(
    like: Tensor, in_blocks: Tensor, absmax: Tensor, elem_dtype: torch.dtype, mode: CastMode
) -> tuple[Tensor, Tensor]:
    exponent = e8m0_exponent(absmax, elem_dtype, mode)
    values = cast_elements(in_blocks, exponent, elem_dtype, mode).reshape(like.shape)
    return values, exponent.squeeze(-1).view(torch.float8_e8m0fnu)


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
    return dequantize_blocks(values, scales, dtype)
