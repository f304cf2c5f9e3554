"""Few rows times weights, all in MXFP8: each weight is read once, in its 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxnorm_pass.kernels.linears import MAX_LINEARS, Linear
from mxnorm_pass.kernels.mx_linear_row import mx_linear_row
from mxnorm_pass.kernels.mx_linear_rows import mx_linear_rows


def mx_linears(
    x: Tensor,
    x_scales: Tensor,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> list[Tensor]:
    """``mxnorm_pass::mx_linear`` of MXFP8 e4m3 for linears that read one x, summed in float32.

    The reference widens both operands to ``dtype`` and multiplies these. Results differ by the
    order of the sums, at most 2 K 2^-24 times the sum of |x| |w|, where ``dtype`` holds the widened
    operands exactly, and by the last rounding to ``dtype``. bfloat16 loses bits below 2^-126 that
    are kept here. Where a block's scale is 2^105 and more, its sum may overflow here, as it is
    scaled by one operand's scale after the other's.

    Args:
        x: [M, K] float8_e4m3fn; K a multiple of 128.
        x_scales: [M, K / 32] float8_e8m0fnu.
        weights: of each linear, [N, K] float8_e4m3fn.
        weight_scales: of each linear, [N, K / 32] float8_e8m0fnu.
        biases: [N] or None, all or none.

    Returns:
        For each linear [M, N] of ``dtype``.
    """
    linears = [
        Linear(
            weight,
            scales.view(torch.uint8),
            bias,
            x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype),
        )
        for weight, scales, bias in zip(weights, weight_scales, biases, strict=True)
    ]
    run = mx_linear_row if x.shape[0] == 1 else mx_linear_rows
    for i in range(0, len(linears), MAX_LINEARS):
        # Elements stay what they are: of a view as bytes Inductor makes a kernel of its own.
        run(x, x_scales.view(torch.uint8), linears[i : i + MAX_LINEARS])
    return [linear.y for linear in linears]
