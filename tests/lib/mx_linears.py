"""Operands of linears in MXFP8, and what their kernels are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kernel_rows import DEVICE
from torch import Tensor

from mxnorm_pass.functional import block_format
from mxnorm_pass.kernels.linears import Linear
from mxnorm_pass.kernels.mx_linear import mx_linears
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
    (y,) = run_all(x, [weight], [bias], dtype)
    return y


def run_all(
    x: Quantized,
    weights: Sequence[Quantized],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype = F32,
) -> list[Tensor]:
    values, scales = [w.values for w in weights], [w.scales for w in weights]
    return mx_linears(x.values, x.scales, values, scales, biases, dtype)


def wide(operand: Quantized) -> Tensor:
    scales = operand.scales.view(torch.uint8).to(F64).sub(127).exp2()
    return operand.values.to(F64) * scales.repeat_interleave(32, -1)


def assert_within_bound(
    y: Tensor, x: Quantized, weight: Quantized, bias: Tensor | None = None
) -> None:
    a, b = wide(x), wide(weight)
    # Roundings in a row, of at most an ulp each as tensor cores truncate: 32 products, two scales,
    # a sum for each block that a warp or a thread takes, and what joins these.
    roundings = 34 + a.shape[-1] / 32 + 8
    bound, want = roundings * 2.0**-23 * (a.abs() @ b.abs().t()), a @ b.t()
    if bias is not None:
        want += bias
        bound += 2.0**-23 * want.abs()
    assert ((y.to(F64) - want).abs() <= bound).all()


def launched(operand: Quantized) -> tuple[Tensor, Tensor]:
    """As kernels take it: elements, and bytes of scales."""
    return operand.values, operand.scales.view(torch.uint8)


def linears_of(rows: int, weights: Sequence[Quantized], biased: bool = False) -> list[Linear]:
    """For a launch; results are yet to be written."""
    linears = []
    for i, weight in enumerate(weights):
        columns = weight.values.shape[0]
        bias = torch.full((columns,), 2.0**i, device=DEVICE) if biased else None
        y = torch.empty(rows, columns, device=DEVICE)
        linears.append(Linear(*launched(weight), bias, y))
    return linears
