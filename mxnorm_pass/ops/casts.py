"""The ops of MX casts and of what undoes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.numerics.cast import Quantized, check_tensor_scale, mx_cast
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.nvfp4 import nvfp4_tensor_scale
from mxnorm_pass.ops.checks import check_blocks, check_quantized, check_rows
from mxnorm_pass.ops.define import Op, define


def _cast(
    x: Tensor, format: str, tensor_scale: Tensor | None = None, square_blocks: bool = False
) -> tuple[Tensor, Tensor]:
    fmt = _checked(x, format, tensor_scale)
    return mx_cast(x.contiguous(), fmt, tensor_scale=tensor_scale, square_blocks=square_blocks)


def _fake_cast(
    x: Tensor, format: str, tensor_scale: Tensor | None = None, square_blocks: bool = False
) -> tuple[Tensor, Tensor]:
    return empty_cast(x, _checked(x, format, tensor_scale))


def _checked(x: Tensor, format: str, tensor_scale: Tensor | None) -> BlockFormat:
    fmt = block_format(format)
    check_tensor_scale(tensor_scale, fmt)
    check_rows("x", x)
    check_blocks("x", x, fmt.block_size)
    return fmt


def empty_cast(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Values and scales of the cast of [..., D], contiguous and uninitialised."""
    scales = x.new_empty(fmt.scales_shape(x.shape), dtype=fmt.scale_dtype)
    return x.new_empty(fmt.values_shape(x.shape), dtype=fmt.elem_dtype), scales


def _dequantize(
    values: Tensor,
    scales: Tensor,
    format: str,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    fmt = block_format(format)
    check_quantized(values, scales, fmt, dtype, tensor_scale)
    return Quantized(values.contiguous(), scales, fmt, tensor_scale).dequantize(dtype)


def _fake_dequantize(
    values: Tensor,
    scales: Tensor,
    format: str,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    fmt = block_format(format)
    check_quantized(values, scales, fmt, dtype, tensor_scale)
    return values.new_empty(fmt.shape_of(values.shape), dtype=dtype)


def _tensor_scale(x: Tensor) -> Tensor:
    check_rows("x", x)
    return nvfp4_tensor_scale(x)


def _fake_tensor_scale(x: Tensor) -> Tensor:
    check_rows("x", x)
    return x.new_empty((), dtype=torch.float32)


def _stays_whole(args: Sequence[Any]) -> bool:
    """Of a transpose: Inductor's C++ for casts along T is not always valid, see ``operands``."""
    x: Tensor = args[0]
    return x.device.type == "cpu" and x.ndim == 2 and x.stride(0) == 1 and x.stride(1) != 1


cast = define(
    Op(
        "cast(Tensor x, str format, Tensor? tensor_scale=None, bool square_blocks=False) "
        "-> (Tensor values, Tensor scales)",
        _cast,
        _fake_cast,
        stays_whole=_stays_whole,
    )
)
tensor_scale = define(Op("tensor_scale(Tensor x) -> Tensor", _tensor_scale, _fake_tensor_scale))
dequantize = define(
    Op(
        "dequantize(Tensor values, Tensor scales, str format, ScalarType dtype, "
        "Tensor? tensor_scale=None) -> Tensor",
        _dequantize,
        _fake_dequantize,
        part="dequantize",
    )
)
