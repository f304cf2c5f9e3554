"""Find the linears whose two operands are dequantised: those that can run on values and scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from mxnorm_pass.graph.matmul import LINEAR_OPERANDS
from mxnorm_pass.graph.nodes import aten, dtype_of, is_call, same_shape, same_size, tensor_of
from mxnorm_pass.passes.match.linears.plain import transposes_weight
from mxnorm_pass.passes.match.linears.widened import Widened, widened_operand

# Position of the bias among the arguments of those that take one.
_BIAS: dict[Any, int] = {aten.addmm.default: 0, aten.linear.default: 2}


@dataclass(frozen=True)
class MXLinear:
    """x weight^T + bias, where x and weight are dequantised.

    Attributes:
        matmul: ``aten.mm``, ``addmm``, ``matmul`` or ``linear``.
        x: [..., K].
        weight: [N, K].
        bias: [N] of the matmul's dtype.
    """

    matmul: fx.Node
    x: Widened
    weight: Widened
    bias: fx.Node | None


def find_mx_linears(graph: fx.Graph) -> Iterator[MXLinear]:
    """In graph order. Changes nothing, but the graph may be changed between two of them."""
    for node in list(graph.nodes):
        if is_call(node, LINEAR_OPERANDS) and (found := _mx_linear(node)) is not None:
            yield found


def _mx_linear(matmul: fx.Node) -> MXLinear | None:
    # Of addmm they hold factors that the op does not have.
    if matmul.kwargs:
        return None
    operands = [matmul.args[i] for i in LINEAR_OPERANDS[matmul.target]]
    a, b = operands
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not _are_rows_and_matrix(a, b):
        return None
    weight = widened_operand(b, transposed=not transposes_weight(matmul))
    if weight is None or len(tensor_of(weight.values).shape) != 2:  # type: ignore[union-attr]
        return None
    x = widened_operand(a, transposed=False)
    if x is None or x.dtype != weight.dtype or not _have_one_width(x, weight):
        return None
    if not _has_known_rows(matmul, x):
        return None
    position = _BIAS.get(matmul.target)
    bias: Any = None if position is None else next(iter(matmul.args[position:]), None)
    if bias is not None and not _is_bias(bias, weight):
        return None
    return MXLinear(matmul, x, weight, bias)


def _are_rows_and_matrix(a: fx.Node, b: fx.Node) -> bool:
    rows, matrix = tensor_of(a), tensor_of(b)
    return rows is not None and matrix is not None and rows.ndim >= 2 and matrix.ndim == 2


def _have_one_width(x: Widened, weight: Widened) -> bool:
    widths = (w.format.shape_of(tensor_of(w.values).shape)[-1] for w in (x, weight))  # type: ignore[union-attr]
    return same_size(next(widths), next(widths))


def _has_known_rows(matmul: fx.Node, x: Widened) -> bool:
    """Can x be viewed in the matmul's rows, before it is computed?"""
    rows, own = (tensor_of(n).shape[:-1] for n in (matmul, x.values))  # type: ignore[union-attr]
    return sum(not isinstance(size, int) for size in rows) <= 1 or same_shape(rows, own)


def _is_bias(bias: Any, weight: Widened) -> bool:
    """One number for each row of the weight: addmm takes other shapes, too."""
    value = tensor_of(bias) if isinstance(bias, fx.Node) else None
    rows = tensor_of(weight.values).shape[:1]  # type: ignore[union-attr]
    return value is not None and same_shape(value.shape, rows) and dtype_of(bias) == weight.dtype
