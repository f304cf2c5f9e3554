"""Few rows times a weight in MXFP8 or MXFP4, which is widened in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.numerics.formats import BlockFormat

_COLUMNS, _DEPTH, _SMALLEST_DOT = 32, 128, 16


@triton.jit
def _scale_values(codes):
    """E8M0 bytes as float32: 0 is 2^-127, 255 is NaN."""
    bits = tl.where(codes == 0, 1 << 22, codes.to(tl.int32) << 23)
    return tl.where(codes == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _half_byte_values(codes):
    """E2M1 codes as float32."""
    mantissa, exponent = (codes & 1).to(tl.float32), ((codes >> 1) & 3).to(tl.int32)
    power = ((exponent + 126) << 23).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, mantissa * 0.5, (1.0 + 0.5 * mantissa) * power)
    return tl.where((codes & 8) != 0, -magnitude, magnitude)


@triton.jit
def mx_linear_kernel(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, y_ptr, rows, columns, width, x_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr,
    ELEM_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N columns of y."""
    row = tl.arange(0, M)[:, None]
    column = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    inside = (column < columns)[:, None]
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        x = tl.load(x_ptr + row * x_stride + k[None, :], row < rows, 0.0)
        if PACKED:
            half = start // 2 + tl.arange(0, K // 2)
            at = weight_ptr + column[:, None] * (width // 2) + half[None, :]
            codes = tl.load(at, inside, 0)
            values = _half_byte_values(tl.interleave(codes & 15, codes >> 4))
        else:
            at = weight_ptr + column[:, None] * width + k[None, :]
            values = tl.load(at, inside, 0).to(ELEM_DTYPE, bitcast=True).to(tl.float32)
        block = start // 32 + tl.arange(0, K // 32)
        at = scales_ptr + column[:, None] * (width // 32) + block[None, :]
        scales = _scale_values(tl.load(at, inside, 0))
        in_blocks = tl.reshape(values, [N, K // 32, 32]) * scales[:, :, None]
        weight = tl.reshape(in_blocks, [N, K]).to(tl.bfloat16)
        # In float32: Triton's interpreter multiplies the bits of bfloat16.
        wide = tl.trans(weight.to(tl.float32))
        total = tl.dot(x.to(tl.float32), wide, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)[None, :]
    at = y_ptr + row * columns + column[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), (row < rows) & (column < columns)[None, :])


def few_rows(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    fmt: BlockFormat,
    dtype: torch.dtype,
) -> Tensor:
    """x weight^T + bias.

    Args:
        x: [M, K] bfloat16.
        weight: [N, K], or [N, K / 2] where two elements share a byte.
        scales: [N, K / 32].
        bias: [N] or None.

    Returns:
        [M, N] of ``dtype``.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, width), columns = x.shape, weight.shape[0]
    y = x.new_empty((rows, columns), dtype=dtype)
    packed = fmt.element.per_byte == 2
    elements = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
    launch.launcher(mx_linear_kernel)[(triton.cdiv(columns, _COLUMNS),)](
        x, weight.view(torch.uint8), scales.view(torch.uint8), bias, y,
        rows, columns, width, x.stride(0),
        M=max(_SMALLEST_DOT, triton.next_power_of_2(rows)), N=_COLUMNS, K=_DEPTH, PACKED=packed,
        ELEM_DTYPE=elements.get(fmt.elem_dtype, tl.uint8),
    )  # fmt: skip
    return y
