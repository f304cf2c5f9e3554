"""Follow cast and uncast tensors to the matrix multiplications of linear layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph_utils import (
    aten,
    forward_users,
    is_call,
    is_dtype_cast,
    is_transpose,
    is_view,
    module_path,
    prims,
    seq_nr,
    strip,
    tensor_of,
)
from mxnorm_pass.match.cast import Cast

_MATMULS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
        aten.linear.default,
        aten._scaled_mm.default,
    }
)
# Position of activation and weight among the operands.
_LINEAR_OPERANDS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
_DEQUANTIZING = frozenset(
    {
        aten.view.dtype,
        aten.permute.default,
        aten.t.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.where.self,
        aten.full_like.default,
        ops.dequantize,
    }
)


@dataclass(frozen=True)
class PlainLinear:
    """A linear on high-precision operands: matmul(activation, weight^T).

    Attributes:
        matmul: ``aten.mm`` or ``aten.addmm``.
        activation: its [T, D] operand.
        weight: its [D, N] operand.
        parameter: the graph input that the weight is.
    """

    name: str
    matmul: fx.Node
    activation: fx.Node
    weight: fx.Node
    parameter: fx.Node

    @property
    def operand_positions(self) -> tuple[int, int]:
        return _LINEAR_OPERANDS[self.matmul.target]


def plain_linear(matmul: fx.Node) -> PlainLinear | None:
    """The linear that a matmul node is, if one operand is a parameter."""
    if not is_call(matmul, _LINEAR_OPERANDS):
        return None
    a, w = (matmul.args[i] for i in _LINEAR_OPERANDS[matmul.target])
    if not isinstance(a, fx.Node) or not isinstance(w, fx.Node):
        return None
    parameter = strip(w, is_transpose, is_view, is_dtype_cast)
    if parameter.op not in ("placeholder", "get_attr"):
        return None
    return PlainLinear(module_path(matmul) or matmul.name, matmul, a, w, parameter)


@dataclass(frozen=True)
class Reader:
    """A way in which the graph reads a norm's output.

    Attributes:
        path: nodes from the norm's output (excluded) to what is read: views and dtype casts.
        node: the node that reads; for a cast, its values.
        cast: the recognised MX cast of the output, None for any other reader.
    """

    path: tuple[fx.Node, ...]
    node: fx.Node
    cast: Cast | None = None


@dataclass(frozen=True)
class CastIndex:
    """The casts of a graph by the node whose elements they cast."""

    by_source: Mapping[fx.Node, tuple[Cast, ...]]
    by_values: Mapping[fx.Node, Cast]

    @classmethod
    def of(cls, casts: Iterable[Cast]) -> CastIndex:
        by_source: dict[fx.Node, tuple[Cast, ...]] = {}
        by_values: dict[fx.Node, Cast] = {}
        for cast in casts:
            by_source[cast.source] = (*by_source.get(cast.source, ()), cast)
            by_values[cast.values] = cast
        return cls(by_source, by_values)


def readers(output: fx.Node, casts: CastIndex) -> list[Reader]:
    """Every forward reader of ``output``, seen through views and floating-point dtype casts."""
    found: list[Reader] = []
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(output, ())]
    while pending:
        node, path = pending.pop(0)
        at_node = casts.by_source.get(node, ())
        found += [Reader(path, cast.values, cast) for cast in at_node]
        for user in forward_users(node):
            if any(user in cast.nodes for cast in at_node):
                continue
            if is_view(user) or (is_dtype_cast(user) and not _is_float8(user)):
                pending.append((user, (*path, user)))
            else:
                found.append(Reader(path, user))
    return found


@dataclass(frozen=True)
class QuantizedMatmul:
    """A matmul fed by a cast.

    Attributes:
        name: dotted name of the linear.
        matmul: the matmul node.
        slice: nodes from the cast's values and scales (excluded) to the matmul (excluded), in
            graph order.
    """

    name: str
    matmul: fx.Node
    slice: tuple[fx.Node, ...]


@dataclass(frozen=True)
class CastUse:
    """Who reads a cast in the forward graph; ``escape`` reads it and is no matmul."""

    matmuls: tuple[QuantizedMatmul, ...] = ()
    escape: fx.Node | None = None


def cast_use(cast: Cast) -> CastUse:
    """Follow a cast's values and scales through dequantisation to the matmuls."""
    reached: dict[fx.Node, set[fx.Node]] = {}
    order: list[fx.Node] = []
    matmuls: dict[fx.Node, None] = {}
    sources = (cast.values, cast.scales)
    queue = deque(sources)
    while queue:
        node = queue.popleft()
        for user in forward_users(node):
            if user in sources:
                continue
            if is_matmul(user):
                matmuls[user] = None
            elif not _dequantizes(user):
                return CastUse(escape=user)
            elif user not in reached:
                queue.append(user)
                order.append(user)
            reached.setdefault(user, set()).add(node)
    return CastUse(
        tuple(
            QuantizedMatmul(module_path(m) or m.name, m, _ancestors(m, reached, sources))
            for m in matmuls
        )
    )


def _ancestors(
    node: fx.Node, inputs: Mapping[fx.Node, set[fx.Node]], sources: tuple[fx.Node, ...]
) -> tuple[fx.Node, ...]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        new = inputs.get(pending.pop(), set()) - found - set(sources)
        found |= new
        pending += new
    return tuple(sorted(found))


def is_matmul(node: fx.Node) -> bool:
    return is_call(node, _MATMULS)


def _is_float8(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype.itemsize == 1


def _dequantizes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or is_view(node) or node.target in _DEQUANTIZING:
        return True
    return node.target in (prims.convert_element_type.default, aten._to_copy.default)


@dataclass(frozen=True)
class WeightCast:
    """The cast of a linear's high-precision weight that the graph computes."""

    cast: Cast
    weight: fx.Node


def weight_cast(matmul: QuantizedMatmul, casts: CastIndex) -> WeightCast | None:
    """The cast behind the matmul's weight operand; None where it arrives quantised."""
    activation = set(matmul.slice)
    for operand in matmul.matmul.all_input_nodes:
        if operand in activation:
            continue
        cast = _cast_behind(operand, casts)
        if cast is not None and cast.values not in activation:
            weight = strip(cast.source, is_view)
            value = tensor_of(weight)
            if value is not None and value.ndim == 2:
                return WeightCast(cast, weight)
    return None


def _cast_behind(operand: fx.Node, casts: CastIndex) -> Cast | None:
    pending, seen = [operand], {operand}
    while pending:
        node = pending.pop()
        if node in casts.by_values:
            return casts.by_values[node]
        if node is not operand and not _dequantizes(node):
            continue
        for child in node.all_input_nodes:
            if child not in seen and len(seen) < 64:
                seen.add(child)
                pending.append(child)
    return None


def forward_seq_nrs(nodes: Iterable[fx.Node]) -> frozenset[int]:
    return frozenset(n for n in map(seq_nr, nodes) if n is not None)


@dataclass(frozen=True)
class Consumer:
    """A linear that reads a norm's output through an MX cast.

    Attributes:
        linear: the matmul and the way from the cast to it.
        reader: the way from the norm's output to the cast.
        cast: the activation's cast.
        weight: the weight's cast, None where the weight arrives quantised.
        seq_nrs: autograd numbers of its forward nodes, by which its backward is known.
    """

    linear: QuantizedMatmul
    reader: Reader
    cast: Cast
    weight: WeightCast | None
    seq_nrs: frozenset[int] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        return self.linear.name
