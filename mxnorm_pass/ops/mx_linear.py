"""The ops of linears whose operands are in block formats.

``mx_linear`` is what inference graphs hold: a linear on values and scales, which runs from weights
of 8 bits and fewer. ``passes.lower_mx_linears`` opens it: the activation is widened, by the kernel
that made it where one did, and ``mx_weight_linear`` multiplies it by the weight. That one has a
kernel for few rows; it dispatches at run time where only each call knows their number.

``mx_linear`` itself computes its reference on every device: with ``inner="aot_eager"`` and
``inner="eager"`` results equal ``functional.mx_linear`` bit for bit, and a kernel sums in another
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.kernels.coverage import uncovered_mx_linear
from mxnorm_pass.numerics.cast import Quantized
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.ops.checks import check_linear, check_rows
from mxnorm_pass.ops.define import Op, define


def _mx_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    x_format: str,
    weight_format: str,
    dtype: torch.dtype,
    x_tensor_scale: Tensor | None = None,
    weight_tensor_scale: Tensor | None = None,
) -> Tensor:
    rows = Quantized(x, x_scales, block_format(x_format), x_tensor_scale)
    matrix = Quantized(weight, weight_scales, block_format(weight_format), weight_tensor_scale)
    check_linear(rows, matrix, bias, dtype)
    return _multiply(_widened(rows, dtype), _widened(matrix, dtype), bias)


def _fake_mx_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    x_format: str,
    weight_format: str,
    dtype: torch.dtype,
    x_tensor_scale: Tensor | None = None,
    weight_tensor_scale: Tensor | None = None,
) -> Tensor:
    rows = Quantized(x, x_scales, block_format(x_format), x_tensor_scale)
    matrix = Quantized(weight, weight_scales, block_format(weight_format), weight_tensor_scale)
    check_linear(rows, matrix, bias, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _mx_weight_linear(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    format: str,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    matrix = Quantized(weight, weight_scales, block_format(format), tensor_scale)
    _check_widened(x, matrix, bias)
    return _multiply(x, _widened(matrix, x.dtype), bias)


def _fake_mx_weight_linear(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    format: str,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    matrix = Quantized(weight, weight_scales, block_format(format), tensor_scale)
    _check_widened(x, matrix, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check_widened(x: Tensor, weight: Quantized, bias: Tensor | None) -> None:
    check_rows("x", x)
    check_linear(x, weight, bias, x.dtype)


def _widened(operand: Quantized, dtype: torch.dtype) -> Tensor:
    contiguous = operand.values.contiguous()
    return Quantized(contiguous, operand.scales, operand.format, operand.tensor_scale).dequantize(
        dtype
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear on a matrix: spelled out, as it becomes batches where x has more dimensions."""
    rows, columns = x.reshape(-1, x.shape[-1]), weight.t()
    y = torch.mm(rows, columns) if bias is None else torch.addmm(bias, rows, columns)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@dataclass(frozen=True)
class MXLinearCall:
    """The arguments of ``mx_linear`` by name; tensors, or the nodes that hold them."""

    x: Any
    x_scales: Any
    weight: Any
    weight_scales: Any
    bias: Any
    x_format: BlockFormat
    weight_format: BlockFormat
    dtype: torch.dtype
    x_tensor_scale: Any = None
    weight_tensor_scale: Any = None

    @classmethod
    def of(cls, args: Sequence[Any]) -> MXLinearCall:
        formats = map(block_format, args[5:7])
        return cls(*args[:5], *formats, *args[7:])


@dataclass(frozen=True)
class MXWeightLinearCall:
    """A call of ``mx_weight_linear``."""

    x: Tensor
    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    format: BlockFormat
    tensor_scale: Tensor | None

    @classmethod
    def of(cls, _: Any, args: Sequence[Any]) -> MXWeightLinearCall:
        x, weight, scales, bias, name, *tensor_scale = args
        return cls(x, weight, scales, bias, block_format(name), next(iter(tensor_scale), None))

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def rows(self) -> Any:
        """How many there are, maybe symbolic."""
        return math.prod(self.x.shape[:-1])

    def why_no_kernel(self) -> str | None:
        rows = self.rows
        if not isinstance(rows, int):
            return "only each call knows how many rows there are"
        return self._uncovered(rows)

    def may_run_kernel(self) -> bool:
        """Is it the number of rows alone that may keep it from a kernel?"""
        return self._uncovered(1) is None

    def _uncovered(self, rows: int) -> str | None:
        if self.tensor_scale is not None:
            return "the weight has a tensor scale, which the kernel does not read"
        if rows == 0:
            return "there are no rows"
        operands = (self.weight, self.scales, self.bias)
        return uncovered_mx_linear(rows, self.x.dtype, *operands, self.format)

    def run_kernel(self, dequantize: torch.dtype | None = None) -> Tensor:
        from mxnorm_pass.kernels.mx_linear import few_rows

        rows = self.x.reshape(-1, self.x.shape[-1])
        # Libraries keep them in the order of native matmuls, and cut them out of it.
        operands = (self.weight, self.scales.contiguous(), self.bias)
        y = few_rows(rows, *operands, self.format, self.x.dtype)
        return y.reshape(*self.x.shape[:-1], self.weight.shape[0])


def _stays_whole(args: Sequence[Any]) -> bool:
    """Where each call has rows of its own number, it chooses between kernel and matmul."""
    call = MXWeightLinearCall.of(None, args)
    return not isinstance(call.rows, int) and call.may_run_kernel()


mx_linear = define(
    Op(
        "mx_linear(Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, Tensor? bias, "
        "str x_format, str weight_format, ScalarType dtype, Tensor? x_tensor_scale=None, "
        "Tensor? weight_tensor_scale=None) -> Tensor",
        _mx_linear,
        _fake_mx_linear,
        traffic="library",
        part="linear",
    )
)
mx_weight_linear = define(
    Op(
        "mx_weight_linear(Tensor x, Tensor weight, Tensor weight_scales, Tensor? bias, "
        "str format, Tensor? tensor_scale=None) -> Tensor",
        _mx_weight_linear,
        _fake_mx_weight_linear,
        call=MXWeightLinearCall.of,
        traffic="library",
        part="linear",
        stays_whole=_stays_whole,
    )
)
