"""Operands of linears in MXFP8, and what their kernels are held against."""

from __future__ import annotations

import torch
from kernel_rows import DEVICE
from torch import Tensor

from mxnorm_pass.functional import block_format
from mxnorm_pass.kernels.mx_linear import mx_linear
from mxnorm_pass.numerics.cast import Quantized

F32, F64 = torch.float32, torch.float64
MXFP8 = block_format("mxfp8")
ONE, NAN_SCALE, NAN_ELEMENT = 127, 255, 0x7F


def operand(rows: int, width: int, seed: int, low: int = 100, high: int = 140) -> Quantized:
    """Every finite element, subnormal ones too, under scales of 2^(low - 127) and more."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == NAN_ELEMENT] = 0
    shape = (rows, width // 32)
    scales = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
    return of_bytes(codes, scales)


def of_bytes(codes: Tensor, scales: Tensor) -> Quantized:
    values = codes.to(DEVICE).view(torch.float8_e4m3fn)
    return Quantized(values, scales.to(DEVICE).view(torch.float8_e8m0fnu), MXFP8)


def run(
    x: Quantized, weight: Quantized, bias: Tensor | None = None, dtype: torch.dtype = F32
) -> Tensor:
    return mx_linear(x.values, x.scales, weight.values, weight.scales, bias, dtype)


def wide(operand: Quantized) -> Tensor:
    scales = operand.scales.view(torch.uint8).to(F64).sub(127).exp2()
    return operand.values.to(F64) * scales.repeat_interleave(32, -1)


def assert_within_bound(y: Tensor, x: Quantized, weight: Quantized) -> None:
    a, b = wide(x), wide(weight)
    # Roundings in a row, of at most an ulp each as tensor cores truncate: 32 products, two scales,
    # a sum for each block that a warp or a thread takes, and what joins these.
    roundings = 34 + a.shape[-1] / 32 + 8
    bound = roundings * 2.0**-23 * (a.abs() @ b.abs().t())
    assert ((y.to(F64) - a @ b.t()).abs() <= bound).all()


def bytes_of(*operands: Quantized) -> list[Tensor]:
    return [t.view(torch.uint8) for o in operands for t in (o.values, o.scales)]
