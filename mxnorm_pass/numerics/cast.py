"""Casts of high-precision tensors to block formats, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.numerics import nvfp4
from mxnorm_pass.numerics.e8m0 import e8m0_exponent, e8m0_to_float, rceil_reciprocal
from mxnorm_pass.numerics.elements import element_values, round_to_elements
from mxnorm_pass.numerics.formats import (
    ELEMENT_DTYPES,
    F32_MANTISSA_BITS,
    F32_SMALLEST_NORMAL,
    BlockFormat,
    block_format,
)
from mxnorm_pass.numerics.layout import block_size_of, blocked_scales_shape
from mxnorm_pass.numerics.rms import blocks
from mxnorm_pass.numerics.stochastic import headroom


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor [..., D] in a block format.

    Attributes:
        values: [..., D], or [..., D / 2] where two elements share a byte.
        scales: [..., K], row-major, or in another layout where a function says so.
        format: of both.
        tensor_scale: [] float32, which scales everything besides; None for 1.
    """

    values: Tensor
    scales: Tensor
    format: BlockFormat
    tensor_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Elements times scales in ``dtype``, of scales that are known to be row-major."""
        if self.format.has_e8m0_scales:
            return self._times(e8m0_to_float(self.scales).to(dtype))
        scales = self.scales.to(torch.float32)
        if self.tensor_scale is not None:
            scales = self.tensor_scale * scales
        return self._times(scales).to(dtype)

    def _times(self, scales: Tensor) -> Tensor:
        """[..., D], elements in the scales' dtype times the scale of their block."""
        elements = element_values(self.values, self.format.element, scales.dtype)
        size = block_size_of(elements.shape, scales.shape)
        in_blocks = elements.reshape(*scales.shape, size)
        return (in_blocks * scales.unsqueeze(-1)).reshape(elements.shape)


@torch.no_grad()
def quantize(
    x: Tensor, fmt: BlockFormat, tensor_scale: Tensor | None = None, *, square_blocks: bool = False
) -> Quantized:
    """Cast [..., D], float32, bfloat16 or float16, along the last dimension.

    With ``square_blocks`` B rows of a matrix [R, D] share their scales, too, so that a matrix and
    its transpose have the same values (arXiv 2509.25149, section 4.3).
    """
    in_blocks = blocks(x, fmt.block_size)
    absmax = absmaxes(in_blocks, square_blocks)
    return cast_blocks(in_blocks.to(torch.float32), absmax, fmt, tensor_scale)


def absmaxes(in_blocks: Tensor, square_blocks: bool = False) -> Tensor:
    """[..., K, 1] float32, the largest |x| of blocks [..., K, B], or of B x B elements."""
    absmax = in_blocks.abs().amax(-1, keepdim=True)
    if square_blocks:
        absmax = _of_squares(absmax, in_blocks.shape[-1])
    return absmax.to(torch.float32)


def _of_squares(absmax: Tensor, size: int) -> Tensor:
    """[R, K, 1], the largest of each run of ``size`` rows in all of them; the last may be short."""
    rows = absmax.shape[0]
    padded = F.pad(absmax, (0, 0, 0, 0, 0, -rows % size)).unflatten(0, (-1, size))
    largest: Tensor = padded.amax(1, keepdim=True).expand_as(padded).flatten(0, 1)[:rows]
    return largest


def quantize_alone(x: Tensor, fmt: BlockFormat) -> Quantized:
    """:func:`quantize`, with the scale of the tensor that its largest element gives."""
    return quantize(x, fmt, None if fmt.has_e8m0_scales else nvfp4.nvfp4_tensor_scale(x))


def cast_blocks(
    in_blocks: Tensor,
    absmax: Tensor,
    fmt: BlockFormat,
    tensor_scale: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Quantized:
    """Cast blocks [..., K, B] in float32 under the scales that their absmaxes [..., K, 1] give.

    With random ``numbers`` [..., K, B] they are rounded stochastically, and are those of
    :func:`mxnorm_pass.numerics.stochastic.headroom` times the blocks.
    """
    if fmt.has_e8m0_scales:
        exponent = e8m0_exponent(absmax, fmt)
        scaled = divide(in_blocks, exponent, fmt)
        # In this order Inductor, which has no e8m0 in C++, drops the view of those who dequantize.
        scales = exponent.squeeze(-1).view(fmt.scale_dtype)
    else:
        block_scales = nvfp4.block_scales(absmax, tensor_scale)
        scaled = in_blocks * nvfp4.reciprocals(block_scales, tensor_scale)
        scales = block_scales.squeeze(-1)
    if numbers is not None:
        scaled = scaled * headroom(fmt)
    values = round_to_elements(scaled, fmt.element, numbers).flatten(-2)
    return Quantized(values, scales, fmt, tensor_scale)


def divide(x: Tensor, exponent: Tensor, fmt: BlockFormat) -> Tensor:
    """Divide by the shared scale.

    Args:
        x: float32, blocks along the last dimension.
        exponent: uint8 biased E8M0 exponents, broadcastable to ``x``.
        fmt: its scale mode made ``exponent`` (it decides how the smallest and largest scales,
            which float32 cannot divide by exactly, are treated).

    Returns:
        float32 of ``x``'s shape, not yet in the element's range.
    """
    if fmt.scale_mode in ("rceil", "rceil-log2"):
        return x * rceil_reciprocal(exponent)
    scale = (exponent.to(torch.int32) << F32_MANTISSA_BITS).view(torch.float32)
    return x / scale.clamp(min=F32_SMALLEST_NORMAL)


def mx_cast(
    x: Tensor,
    format: BlockFormat | str = "mxfp8",
    *,
    tensor_scale: Tensor | None = None,
    square_blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cast to a block format along the last dimension.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        format: a :class:`BlockFormat` or the name of one, see :func:`block_format`.
        tensor_scale: [] float32, of NVFP4 alone: what all block scales are divided by, such as
            :func:`nvfp4_tensor_scale` of ``x``; None for 1.
        square_blocks: of a matrix, B rows share their scales, see :func:`quantize`.

    Returns:
        values [..., D] of the format's ``elem_dtype``, [..., D / 2] where two elements share a
        byte, and scales [..., K] of its ``scale_dtype``. Equal to torchao's ``to_mx`` and
        ``nvfp4_quantize`` bit for bit, but for the sign of NaN and, where elements have no NaN,
        those of blocks whose scale is NaN; its RCEIL of float32 is "rceil-log2" (see
        :func:`mxnorm_pass.numerics.e8m0.e8m0_exponent`).

    Raises:
        ValueError: no such format, D is not divisible by its block size, it takes no
            ``tensor_scale``, or ``square_blocks`` of what is no matrix.
    """
    fmt = block_format(format)
    check_tensor_scale(tensor_scale, fmt)
    if square_blocks and x.ndim != 2:
        raise ValueError(f"square_blocks are of a matrix; x has shape {tuple(x.shape)}")
    quantized = quantize(x, fmt, tensor_scale, square_blocks=square_blocks)
    return quantized.values, quantized.scales


def check_tensor_scale(tensor_scale: Tensor | None, fmt: BlockFormat) -> None:
    """Raises a ValueError unless the format takes it."""
    if tensor_scale is None:
        return
    if fmt.has_e8m0_scales:
        raise ValueError(f"tensor_scale belongs to NVFP4; the format is {fmt.name!r}")
    if tensor_scale.shape != () or tensor_scale.dtype is not torch.float32:
        raise ValueError(
            f"tensor_scale has shape {tuple(tensor_scale.shape)} and dtype {tensor_scale.dtype}; "
            "it must be one float32 number, of shape ()"
        )


@torch.no_grad()
def mx_dequantize(
    values: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int | None = None,
    format: BlockFormat | str | None = None,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """Elements times scales in ``dtype``.

    Args:
        values: what :func:`mx_cast` returns, of a tensor [..., D].
        scales: [..., K], row-major.
        dtype: bfloat16 holds every element times a power of two exactly, within its range.
        block_size: None for D / K.
        format: None where the dtype of values says it; elements of 6 and 4 bits need it.
        tensor_scale: what :func:`mx_cast` was given.

    Returns:
        [..., D] of ``dtype``; blocks whose scale is NaN are NaN.

    Raises:
        ValueError: the shapes do not belong together, or not to ``block_size`` or ``format``; or
            neither is given and ``scales`` may as well be in the 128x4 layout, for blocks of 32.
        TypeError: ``values`` or ``scales`` are not of the format's dtypes.
    """
    fmt = _format_of(values) if format is None else block_format(format)
    check_tensor_scale(tensor_scale, fmt)
    if (values.dtype, scales.dtype) != (fmt.elem_dtype, fmt.scale_dtype):
        raise TypeError(
            f"values and scales are of {values.dtype} and {scales.dtype}; the format {fmt.name!r} "
            f"has {fmt.elem_dtype} and {fmt.scale_dtype}"
        )
    shape = fmt.shape_of(values.shape)
    inferred = block_size_of(shape, scales.shape)
    wanted = fmt.block_size if block_size is None and format is not None else block_size
    if wanted is not None and inferred != wanted:
        raise ValueError(f"block_size is {wanted}, but scales has one per {inferred} values")
    blocked = blocked_scales_shape(fmt.scales_shape(shape))
    if wanted is None and inferred != fmt.block_size and scales.shape == blocked:
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} are row-major for blocks of {inferred}, or in "
            f"the 128x4 layout for blocks of {fmt.block_size}, which cannot be read here; "
            f"block_size={inferred} says that they are the first"
        )
    return Quantized(values, scales, fmt, tensor_scale).dequantize(dtype)


def _format_of(values: Tensor) -> BlockFormat:
    """The format that the dtype says, with its own block size."""
    if values.dtype in ELEMENT_DTYPES:
        return BlockFormat.of(values.dtype)
    raise ValueError(
        f"values are of {values.dtype}, which does not say what elements they are; give format=, "
        "such as 'mxfp6 e2m3'"
    )
