"""Checks of what the ops are given; every error names the argument."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from mxnorm_pass.numerics.cast import Quantized, check_tensor_scale
from mxnorm_pass.numerics.checks import check_choice
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.layout import ScaleLayout, block_size_of
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.rms import Estimator

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDE_FLOATS = (*_FLOATS, torch.float64)


def check_rows(name: str, x: Tensor) -> None:
    """High-precision rows: [..., D], dense.

    Raises:
        TypeError: wrong dtype or layout.
        ValueError: no last dimension.
    """
    _check_dense(name, x, _FLOATS)
    if x.ndim == 0:
        raise ValueError(f"{name} is a scalar; it must be [..., D]")


def _check_dense(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; allowed: {_listed(dtypes)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; it must be dense (torch.strided)")


def _listed(choices: Any) -> str:
    return ", ".join(map(str, choices))


def check_blocks(name: str, x: Tensor, block_size: int) -> None:
    """Raises a ValueError unless the last dimension is whole blocks."""
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    if x.shape[-1] % block_size != 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, whose last dimension is not divisible by "
            f"block_size {block_size}"
        )


def check_rows_in_blocks(name: str, x: Tensor, block_size: int) -> None:
    """Raises a ValueError unless the rows, all leading dimensions, are whole blocks."""
    rows = math.prod(x.shape[:-1])
    if rows % block_size != 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, whose {rows} rows are not divisible by "
            f"block_size {block_size}"
        )


def check_spec(spec: NormCastSpec) -> None:
    """Options of ``norm_cast``; a ValueError names the one that is wrong."""
    check_choice("estimator", spec.estimator, get_args(Estimator))
    check_choice("scale_layout", spec.scale_layout, get_args(ScaleLayout))
    check_choice("norm_dtype", spec.norm_dtype, (None, *_WIDE_FLOATS))
    check_choice("out_dtype", spec.out_dtype, _WIDE_FLOATS)
    if not (math.isfinite(spec.p) and spec.p > 0):
        raise ValueError(f"p is {spec.p}; it must be a finite number > 0")
    if not (math.isfinite(spec.eps) and spec.eps >= 0):
        raise ValueError(f"eps is {spec.eps}; it must be a finite number >= 0")


def check_norm_cast(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    tensor_scale: Tensor | None,
    spec: NormCastSpec,
    residual: Tensor | None = None,
) -> None:
    """Arguments of ``norm_cast`` and its kin.

    Raises:
        TypeError: a wrong dtype or layout.
        ValueError: a wrong shape, device or option.
    """
    check_spec(spec)
    check_tensor_scale(tensor_scale, spec.format)
    check_rows("x", x)
    check_blocks("x", x, spec.format.block_size)
    if residual is not None:
        check_rows("residual", residual)
        _check_like("residual", residual, x, tuple(x.shape))
    if weight is not None:
        _check_dense("weight", weight, _WIDE_FLOATS)
        _check_like("weight", weight, x, (x.shape[-1],))
    if block_weights is not None:
        if spec.estimator == "exact":
            raise ValueError("block_weights belong to estimator 'mxnorm'; estimator is 'exact'")
        _check_dense("block_weights", block_weights, (torch.float32,))
        _check_like("block_weights", block_weights, x, (x.shape[-1] // spec.format.block_size,))


def check_inverse_rms(
    x: Tensor, block_weights: list[float] | None, p: float, block_size: int, gradient: str
) -> None:
    """Arguments of ``inverse_rms``.

    Raises:
        TypeError: ``x`` is not in float32, or not dense.
        ValueError: a wrong shape or option.
    """
    _check_dense("x", x, (torch.float32,))
    if x.ndim == 0:
        raise ValueError("x is a scalar; it must be [..., D]")
    check_blocks("x", x, block_size)
    check_choice("gradient", gradient, get_args(Gradient))
    if not (math.isfinite(p) and p > 0):
        raise ValueError(f"p is {p}; it must be a finite number > 0")
    blocks = x.shape[-1] // block_size
    if block_weights is not None and len(block_weights) != blocks:
        raise ValueError(
            f"block_weights has {len(block_weights)} elements; the rows have {blocks} blocks"
        )


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; for x of shape {tuple(x.shape)} it must be "
            f"{shape}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must be on one")


def check_quantized(
    values: Tensor,
    scales: Tensor,
    fmt: BlockFormat,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> None:
    """Arguments of ``dequantize``.

    Raises:
        TypeError: ``values`` or ``scales`` have another dtype than the format's.
        ValueError: their shapes do not belong together, their devices differ, ``dtype`` is no
            high-precision one, or the format takes no ``tensor_scale``.
    """
    check_tensor_scale(tensor_scale, fmt)
    _check_dense("values", values, (fmt.elem_dtype,))
    _check_dense("scales", scales, (fmt.scale_dtype,))
    check_choice("dtype", dtype, _WIDE_FLOATS)
    block_size = block_size_of(fmt.shape_of(values.shape), scales.shape)
    if block_size != fmt.block_size:
        raise ValueError(f"scales has one per {block_size} values; the format is {fmt.name!r}")
    if values.device != scales.device:
        raise ValueError(
            f"scales is on {scales.device}, values on {values.device}; they must be on one"
        )


def check_linear(
    x: Tensor | Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype
) -> None:
    """Arguments of ``mx_linear`` and its kin.

    Args:
        x: [..., K], in a block format or of high precision.
        weight: [N, K].
        bias: [N] or None.
        dtype: of the matmul.

    Raises:
        TypeError: values, scales or the bias have another dtype than the format or ``dtype``.
        ValueError: shapes do not belong together, or the tensors are on several devices.
    """
    _check_operand("weight", weight, dtype)
    values, width = (x, x.shape[-1:]) if isinstance(x, Tensor) else (x.values, _width(x))
    if isinstance(x, Quantized):
        _check_operand("x", x, dtype)
    if weight.values.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.values.shape)}; it must be [N, K]")
    if width != _width(weight):
        raise ValueError(
            f"x has rows of {width[0]} elements and weight of {_width(weight)[0]}; they are "
            "[..., K] and [N, K]"
        )
    if values.device != weight.values.device:
        raise ValueError(
            f"x is on {values.device}, weight on {weight.values.device}; they must be on one: "
            "move one of them"
        )
    if bias is not None:
        _check_dense("bias", bias, (dtype,))
        _check_like("bias", bias, values, (weight.values.shape[0],))


def _width(operand: Quantized) -> tuple[int, ...]:
    return operand.format.shape_of(operand.values.shape)[-1:]


def _check_operand(name: str, operand: Quantized, dtype: torch.dtype) -> None:
    own = (operand.values, operand.scales, operand.format)
    try:
        check_quantized(*own, dtype, operand.tensor_scale)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
