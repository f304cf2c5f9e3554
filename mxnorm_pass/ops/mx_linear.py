"""The op of linears whose operands are in block formats, and one of several that has a kernel.

``mx_linear`` is what inference graphs hold: a linear on values and scales, which runs from weights
of 8 bits and fewer. It computes its reference on every device: with ``inner="aot_eager"`` and
``inner="eager"`` results equal ``functional.mx_linear`` bit for bit, and a kernel sums in another
order. ``passes.lower_mx_linears`` puts ``few_rows_mx_linears`` in its place for Inductor where a
kernel covers it, or may do so at run time, where only each call knows how many rows it has; those
that read one x together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.kernels.coverage import uncovered_mx_linear
from mxnorm_pass.numerics.cast import Quantized
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.ops.checks import check_linear
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
    return multiply(widened(rows, dtype), widened(matrix, dtype), bias)


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


def widened(operand: Quantized, dtype: torch.dtype) -> Tensor:
    contiguous = operand.values.contiguous()
    return Quantized(contiguous, operand.scales, operand.format, operand.tensor_scale).dequantize(
        dtype
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear on a matrix: spelled out, as it becomes batches where x has more dimensions."""
    rows, columns = x.reshape(-1, x.shape[-1]), weight.t()
    y = torch.mm(rows, columns) if bias is None else torch.addmm(bias, rows, columns)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _of_each(linear: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """``linear`` for several that read one x."""

    def linears(
        x: Tensor,
        x_scales: Tensor,
        weights: Sequence[Tensor],
        weight_scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *formats_and_dtype: Any,
    ) -> list[Tensor]:
        each = zip(weights, weight_scales, biases, strict=True)
        return [linear(x, x_scales, *of, *formats_and_dtype) for of in each]

    return linears


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
class FewRowsCall:
    """The arguments of ``few_rows_mx_linears`` by name; tensors, maybe fake."""

    x: Tensor
    x_scales: Tensor
    weights: Sequence[Tensor]
    weight_scales: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    x_format: BlockFormat
    weight_format: BlockFormat
    dtype: torch.dtype

    @classmethod
    def of(cls, _: Any, args: Sequence[Any]) -> FewRowsCall:
        return cls(*args[:5], *map(block_format, args[5:7]), *args[7:])

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def rows(self) -> int | None:
        """How many there are; None where only each call knows."""
        rows = math.prod(self.x.shape[:-1])
        return rows if isinstance(rows, int) else None

    def why_no_kernel(self) -> str | None:
        if self.rows is None:
            return "only each call knows how many rows there are"
        return self.why_never()

    def why_never(self) -> str | None:
        """Why no kernel can run it with any number of rows that it may have."""
        rows = 1 if self.rows is None else self.rows
        x = Quantized(self.x, self.x_scales, self.x_format)
        for weight, scales, bias in zip(self.weights, self.weight_scales, self.biases, strict=True):
            matrix = Quantized(weight, scales, self.weight_format)
            reason = uncovered_mx_linear(x, matrix, bias, self.dtype, rows)
            if reason is not None:
                return reason
        return None

    def run_kernel(self, dequantize: torch.dtype | None = None) -> tuple[Tensor, ...]:
        from mxnorm_pass.kernels.mx_linear import mx_linears

        x, x_scales = (t.reshape(-1, t.shape[-1]) for t in (self.x, self.x_scales))
        # Libraries keep scales in the order of native matmuls, and cut them out of it.
        scales = [scales.contiguous() for scales in self.weight_scales]
        results = mx_linears(
            x, x_scales.contiguous(), self.weights, scales, self.biases, self.dtype
        )
        return tuple(y.reshape(*self.x.shape[:-1], y.shape[-1]) for y in results)


def _is_called(args: Sequence[Any]) -> bool:
    """Unless it is of one row, whose kernel is Triton's: Inductor takes none in Gluon."""
    call = FewRowsCall.of(None, args)
    return call.rows != 1 and call.why_never() is None


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
few_rows_mx_linears = define(
    Op(
        "few_rows_mx_linears(Tensor x, Tensor x_scales, Tensor[] weights, Tensor[] weight_scales, "
        "Tensor?[] biases, str x_format, str weight_format, ScalarType dtype) -> Tensor[]",
        _of_each(_mx_linear),
        _of_each(_fake_mx_linear),
        call=FewRowsCall.of,
        traffic="library",
        part="linear",
        is_called=_is_called,
    )
)
