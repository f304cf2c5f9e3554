"""The ops of MX casts and of what undoes them."""

from __future__ import annotations

import torch
from torch import Tensor

from mxnorm_pass.numerics.cast import Quantized, mx_cast
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.ops.checks import check_blocks, check_quantized, check_rows
from mxnorm_pass.ops.define import Op, define


def _cast(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    fmt = _checked(x, format)
    return mx_cast(x.contiguous(), fmt)


def _fake_cast(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    return empty_cast(x, _checked(x, format))


def _checked(x: Tensor, format: str) -> BlockFormat:
    fmt = block_format(format)
    check_rows("x", x)
    check_blocks("x", x, fmt.block_size)
    return fmt


def empty_cast(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Values and scales of the cast of [..., D], contiguous and uninitialised."""
    scales = x.new_empty(fmt.scales_shape(x.shape), dtype=fmt.scale_dtype)
    return x.new_empty(fmt.values_shape(x.shape), dtype=fmt.elem_dtype), scales


def _dequantize(values: Tensor, scales: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    fmt = block_format(format)
    check_quantized(values, scales, fmt, dtype)
    return Quantized(values.contiguous(), scales, fmt).dequantize(dtype)


def _fake_dequantize(values: Tensor, scales: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    fmt = block_format(format)
    check_quantized(values, scales, fmt, dtype)
    return values.new_empty(fmt.shape_of(values.shape), dtype=dtype)


cast = define(Op("cast(Tensor x, str format) -> (Tensor values, Tensor scales)", _cast, _fake_cast))
dequantize = define(
    Op(
        "dequantize(Tensor values, Tensor scales, str format, ScalarType dtype) -> Tensor",
        _dequantize,
        _fake_dequantize,
        part="dequantize",
    )
)
