"""Few rows times a weight, both in MXFP8: the weight is read once, in its 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mxnorm_pass.kernels.mx_linear_row import mx_linear_row
from mxnorm_pass.kernels.mx_linear_rows import mx_linear_rows


def mx_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``mxnorm_pass::mx_linear`` of operands in MXFP8 e4m3, summed in float32.

    The reference widens both operands to ``dtype`` and multiplies these. Results differ by the
    order of the sums, at most 2 K 2^-24 times the sum of |x| |w|, where ``dtype`` holds the widened
    operands exactly, and by the last rounding to ``dtype``. bfloat16 loses bits below 2^-126 that
    are kept here. Where a block's scale is 2^105 and more, its sum may overflow here, as it is
    scaled by one operand's scale after the other's.

    Args:
        x: [M, K] float8_e4m3fn; K a multiple of 128.
        x_scales: [M, K / 32] float8_e8m0fnu.
        weight: [N, K] float8_e4m3fn.
        weight_scales: [N, K / 32] float8_e8m0fnu.
        bias: [N] or None.

    Returns:
        [M, N] of ``dtype``.
    """
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    of_x = (x.view(torch.uint8), x_scales.view(torch.uint8))
    of_weight = (weight.view(torch.uint8), weight_scales.view(torch.uint8))
    run = mx_linear_row if x.shape[0] == 1 else mx_linear_rows
    run(*of_x, *of_weight, bias, y)
    return y
