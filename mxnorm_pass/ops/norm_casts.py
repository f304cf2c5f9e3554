"""The ops that normalise rows and cast them: along D, or along D and T, with or without an add."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.numerics.layout import blocked_scales_shape
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.norm_cast import NormCastSpec, mxnorm_cast, mxnorm_cast_both
from mxnorm_pass.ops.call import NormCastCall
from mxnorm_pass.ops.casts import empty_cast
from mxnorm_pass.ops.checks import check_norm_cast, check_rows_in_blocks
from mxnorm_pass.ops.define import Op, define
from mxnorm_pass.ops.operands import operand_of_arguments


def _norm_cast(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    tensor_scale: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = NormCastSpec.of_arguments(*options)
    check_norm_cast(x, weight, block_weights, tensor_scale, spec)
    return mxnorm_cast(
        x.contiguous(),
        weight,
        block_weights=block_weights,
        tensor_scale=tensor_scale,
        **spec.keywords(),
    )


def _norm_cast_both(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    tensor_scale: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_rows, (gain_in_rows, *drawn) = options[:_OPTIONS], options[_OPTIONS:]
    spec = NormCastSpec.of_arguments(*of_rows)
    check_norm_cast(x, weight, block_weights, tensor_scale, spec)
    along_t, draw = operand_of_arguments(x, *drawn)
    check_rows_in_blocks("x", x, _multiple(spec, along_t))
    return mxnorm_cast_both(
        x.contiguous(),
        weight,
        block_weights=block_weights,
        tensor_scale=tensor_scale,
        gain_in_rows=gain_in_rows,
        along_t=along_t,
        draw=draw,
        **spec.keywords(),
    )


def _multiple(spec: NormCastSpec, along_t: Operand | None) -> int:
    """What divides the rows."""
    if along_t is None:
        return spec.format.block_size
    size = 1 if along_t.hadamard is None else along_t.hadamard.size
    return math.lcm(along_t.cast.block_size, size)


_OPTIONS = len(fields(NormCastSpec))


def _after_add(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op that adds a residual to its first argument and returns the sum before the rest."""

    def add_first(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        block_weights: Tensor | None,
        tensor_scale: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        spec = NormCastSpec.of_arguments(*options[:_OPTIONS])
        check_norm_cast(x, weight, block_weights, tensor_scale, spec, residual)
        total = (x + residual).contiguous()
        return total, *function(total, weight, block_weights, tensor_scale, *options)

    return add_first


def _fake_norm_cast(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    tensor_scale: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = NormCastSpec.of_arguments(*options)
    check_norm_cast(x, weight, block_weights, tensor_scale, spec)
    values, scales = empty_cast(x, spec.format)
    if spec.scale_layout == "blocked":
        scales = scales.new_empty(blocked_scales_shape(scales.shape))
    return values, scales, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_norm_cast_both(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    tensor_scale: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_rows, (_, *drawn) = options[:_OPTIONS], options[_OPTIONS:]
    along_rows = _fake_norm_cast(x, weight, block_weights, tensor_scale, *of_rows)
    spec = NormCastSpec.of_arguments(*of_rows)
    along_t, _ = operand_of_arguments(x, *drawn)
    check_rows_in_blocks("x", x, _multiple(spec, along_t))
    fmt = spec.format if along_t is None else along_t.cast.format
    assert fmt is not None
    return *along_rows, *empty_cast(x.reshape(-1, x.shape[-1]).t(), fmt)


_NORM = (
    "Tensor? weight, Tensor? block_weights, Tensor? tensor_scale, float eps, str estimator, "
    "float p, str format, ScalarType? norm_dtype, ScalarType out_dtype, str scale_layout"
)
_ALONG_ROWS = "Tensor values, Tensor scales, Tensor rho"
_BOTH = f"{_ALONG_ROWS}, Tensor values_t, Tensor scales_t"
_ALONG_T = 'bool gain_in_rows, Tensor? seed=None, int key=0, int right_key=0, str along_t=""'
_PART = "norm and cast"

add_norm_cast = define(
    Op(
        f"add_norm_cast(Tensor x, Tensor residual, {_NORM}) -> (Tensor total, {_ALONG_ROWS})",
        _after_add(_norm_cast),
        _after_add(_fake_norm_cast),
        call=NormCastCall.of,
        part=_PART,
    )
)
norm_cast = define(
    Op(
        f"norm_cast(Tensor x, {_NORM}) -> ({_ALONG_ROWS})",
        _norm_cast,
        _fake_norm_cast,
        call=NormCastCall.of,
        part=_PART,
        add_first=add_norm_cast,
    )
)
add_norm_cast_both = define(
    Op(
        f"add_norm_cast_both(Tensor x, Tensor residual, {_NORM}, {_ALONG_T}) "
        f"-> (Tensor total, {_BOTH})",
        _after_add(_norm_cast_both),
        _after_add(_fake_norm_cast_both),
        call=NormCastCall.of,
        part=_PART,
        along_rows_only=add_norm_cast,
    )
)
norm_cast_both = define(
    Op(
        f"norm_cast_both(Tensor x, {_NORM}, {_ALONG_T}) -> ({_BOTH})",
        _norm_cast_both,
        _fake_norm_cast_both,
        call=NormCastCall.of,
        part=_PART,
        add_first=add_norm_cast_both,
        along_rows_only=norm_cast,
    )
)
