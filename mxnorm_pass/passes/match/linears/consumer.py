"""The linears that multiply a cast, and the casts of their weights."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass.graph.code import type_name
from mxnorm_pass.graph.nodes import (
    is_call,
    is_transpose,
    is_view,
    same_size,
    strip,
    tensor_of,
)
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.linears.plain import transposes_weight
from mxnorm_pass.passes.match.linears.products import LAYOUT, QuantizedMatmul, cast_use, is_constant
from mxnorm_pass.passes.match.linears.readers import Reader


@dataclass(frozen=True)
class WeightCast:
    """The cast of a linear's high-precision weight that the graph computes.

    Attributes:
        slice: nodes from the cast's values and scales (excluded) to the matmul (excluded).
    """

    cast: Cast
    weight: fx.Node
    slice: tuple[fx.Node, ...] = ()


def casts_by_matmul(casts: Iterable[Cast]) -> dict[fx.Node, tuple[Cast, ...]]:
    """The casts that each matmul multiplies."""
    found: dict[fx.Node, tuple[Cast, ...]] = {}
    for cast in casts:
        for use in cast_use(cast).matmuls:
            found[use.matmul] = (*found.get(use.matmul, ()), cast)
    return found


def weight_cast(
    matmul: QuantizedMatmul, activation: Cast, casts: Mapping[fx.Node, tuple[Cast, ...]]
) -> WeightCast | None:
    """The cast of the [N, D] weight in activation @ weight^T; None where none is in the graph."""
    others = [c for c in casts.get(matmul.matmul, ()) if c is not activation]
    values = [n for n in matmul.slice if n not in matmul.of_scales]
    if len(others) != 1 or any(is_call(n, LAYOUT) for n in values):
        return None
    weight = strip(others[0].source, is_view)
    value = tensor_of(weight)
    own = next(u for u in cast_use(others[0]).matmuls if u.matmul is matmul.matmul)
    # The channels must be what the matmul contracts: an odd number of transpositions of values,
    # the one that the op itself may do included.
    transpositions = sum(is_transpose(n) and n not in own.of_scales for n in own.slice)
    transpositions += transposes_weight(matmul.matmul)
    if value is None or value.ndim != 2 or transpositions % 2 == 0:
        return None
    if not same_size(value.shape[-1], _contracted(matmul.matmul, activation, values)):
        # The weight's rows, or those of the activation, were divided into several.
        return None
    return WeightCast(others[0], weight, own.slice)


def _contracted(matmul: fx.Node, cast: Cast, values: Container[fx.Node]) -> int | None:
    """How many elements a row of the activation has in the matmul."""
    operands = (n for n in matmul.all_input_nodes if n is cast.values or n in values)
    operand = next(operands, None)
    value = None if operand is None else tensor_of(operand)
    if value is None:
        return None
    is_packed = value.dtype.itemsize == 1
    return value.shape[-1] * (cast.format.element.per_byte if is_packed else 1)


@dataclass(frozen=True)
class Consumer:
    """A linear that reads a norm's output through an MX cast.

    Attributes:
        linear: the matmul and the way from the cast to it.
        reader: the way from the norm's output to the cast.
        cast: the activation's cast.
        weight: the weight's cast, None where the weight arrives quantised.
        rounds_to: dtype to which the norm's output is rounded on its way to the cast; None if it
            passes through several narrow ones.
        dequantized: on the way to the matmul, the values times scales, if they are those of
            ``mxnorm_pass::dequantize``.
    """

    linear: QuantizedMatmul
    reader: Reader
    cast: Cast
    weight: WeightCast | None
    rounds_to: torch.dtype | None
    dequantized: fx.Node | None = None

    @property
    def name(self) -> str:
        return self.linear.name

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """From the norm's output (excluded) to the matmul, but for the cast's own."""
        return (*self.reader.path, *self.linear.slice, self.linear.matmul)

    @property
    def quantized(self) -> tuple[fx.Node, ...]:
        """The nodes that hold what is made of the casts of activation and weight."""
        found = (self.cast.values, self.cast.scales, *self.linear.slice)
        if self.weight is None:
            return found
        return (*found, self.weight.cast.values, self.weight.cast.scales, *self.weight.slice)


def weight_text(consumer: Consumer) -> str:
    """The matrices that a consumer's weight is made of, for people."""
    cast, linear = consumer.cast, consumer.linear
    seen = {cast.values, cast.scales, *linear.slice}
    pending = linear.matmul.all_input_nodes
    found: dict[str, None] = {}
    while pending:
        node = pending.pop(0)
        if node in seen or is_constant(node):
            continue
        seen.add(node)
        if node.op == "call_function":
            pending += node.all_input_nodes
        elif (value := tensor_of(node)) is not None and value.ndim > 1:
            found[type_name(node)] = None
    return " and ".join(found) or "a constant"
