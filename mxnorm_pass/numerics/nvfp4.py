"""NVFP4's scales: one in e4m3 for each block, and one in float32 for the tensor.

As torchao 0.18 computes them (prototype/mx_formats/nvfp4_tensor.py, nvfp4_quantize), bit for bit.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from mxnorm_pass.numerics.formats import ELEMENTS

_LARGEST_SCALE: Final = ELEMENTS["e4m3fn"].max
# e4m3's smallest normal value.
_SMALLEST_SCALE: Final = 2.0**-6
# With it the inverse of the two scales' product is finite.
_SMALLEST_TENSOR_SCALE: Final = 2.0**-120


def nvfp4_tensor_scale(x: Tensor) -> Tensor:
    """The scale that lets the largest element of a tensor have the largest block scale.

    Args:
        x: any shape, float32, bfloat16 or float16.

    Returns:
        [] float32: max|x| / (448 * 6), at least 2**-120; 0 would make NaN of a tensor of zeros.
    """
    # Of no rows it is that of zeros.
    rows = x.detach().abs().reshape(-1, *x.shape[-1:]).amax(-1)
    return _scale_for(torch.cat([rows.flatten(), rows.new_zeros(1)]).amax().to(torch.float32))


def nvfp4_norm_tensor_scale(
    bound: float, weight: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """The tensor scale of a norm's output, from what bounds it rather than from its elements.

    A normalised row is bounded, see :func:`mxnorm_pass.numerics.rms.bound_of_normalized`, and so
    is what the gain makes of it. So no pass over the tensor has to end before it is cast.

    Args:
        bound: of |x| / rms.
        weight: the norm's gain [D], if the cast includes it.
        device: of the result where there is no ``weight``.

    Returns:
        [] float32: bound * max|weight| / (448 * 6), at least 2**-120. What is no number in one row
        stays there, where :func:`nvfp4_tensor_scale` would spread it over the tensor.

    Raises:
        ValueError: ``bound`` is not a positive finite number of float32's range.
    """
    if not 0 < bound <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"bound is {bound}; it must be a positive finite number of float32's range, or use "
            "nvfp4_tensor_scale of the normalised tensor"
        )
    if weight is None:
        return _scale_for(torch.full((), bound, dtype=torch.float32, device=device))
    return _scale_for(bound * weight.detach().abs().amax().to(torch.float32))


def _scale_for(largest: Tensor) -> Tensor:
    scale = largest / (_LARGEST_SCALE * ELEMENTS["e2m1"].max)
    return scale.clamp(min=_SMALLEST_TENSOR_SCALE)


def block_scales(absmax: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Scales of blocks, ``torch.float8_e4m3fn``, of their absmaxes in float32.

    Finite ones lie between e4m3's smallest normal value and its largest; NaN stays NaN.
    """
    scales = absmax / ELEMENTS["e2m1"].max
    if tensor_scale is not None:
        scales = scales / tensor_scale
    return scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)


def reciprocals(scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """What elements are multiplied by, float32: the inverse of both scales, in torchao's order."""
    inverse = 1.0 if tensor_scale is None else 1.0 / tensor_scale
    return inverse / scales.to(torch.float32)
