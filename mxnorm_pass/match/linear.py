"""Follow cast and uncast tensors to the matrix multiplications of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heappop, heappush

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.code import type_name
from mxnorm_pass.graph.inputs import PARAMETER, WEIGHT
from mxnorm_pass.graph.matmul import LINEAR_OPERANDS, is_matmul
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import (
    aten,
    forward_users,
    is_call,
    is_dtype_cast,
    is_transpose,
    is_view,
    prims,
    strip,
    tensor_of,
)
from mxnorm_pass.graph.weights import Weight
from mxnorm_pass.match.cast import Cast
from mxnorm_pass.match.scale_layout import is_blocked, moves_bytes

_LAYOUT = frozenset({aten.permute.default, aten.t.default, aten.transpose.int, aten.slice.Tensor})
# What turns scales into numbers, beside pointwise ops.
_DECODING = frozenset({aten.view.dtype, aten.where.self, aten.full_like.default, aten.full.default})
_CONSTANTS = frozenset({aten.full.default, aten.scalar_tensor.default, aten.zeros.default})
PRODUCTS = frozenset({aten.mul.Tensor, ops.dequantize})


@dataclass(frozen=True)
class PlainLinear:
    """A linear on high-precision operands: matmul(activation, weight^T).

    Attributes:
        matmul: ``aten.mm``, ``addmm``, ``matmul`` or ``linear``.
        activation: its [..., D] operand.
        weight: its [D, N] operand; [N, D] where ``transposes`` is true.
        parameter: the graph input that the weight is.
        opt_in: it is changed only where ``modules`` names it.
    """

    name: str
    matmul: fx.Node
    activation: fx.Node
    weight: fx.Node
    parameter: fx.Node
    opt_in: bool = False

    @property
    def operand_positions(self) -> tuple[int, int]:
        return LINEAR_OPERANDS[self.matmul.target]

    @property
    def transposes(self) -> bool:
        return _transposes_weight(self.matmul)


def _transposes_weight(matmul: fx.Node) -> bool:
    """Does the op itself transpose its second operand?"""
    return matmul.target is aten.linear.default


def plain_linear(matmul: fx.Node) -> PlainLinear | None:
    """The linear that a matmul node is, if one operand is a parameter."""
    if not is_call(matmul, LINEAR_OPERANDS):
        return None
    a, w = (matmul.args[i] for i in LINEAR_OPERANDS[matmul.target])
    if not isinstance(a, fx.Node) or not isinstance(w, fx.Node):
        return None
    value = tensor_of(w)
    if value is None or value.ndim != 2:
        return None
    parameter = strip(w, is_transpose, is_view, is_dtype_cast)
    if parameter.op not in ("placeholder", "get_attr") or not _is_weight(parameter, matmul):
        return None
    name = linear_name(matmul) or matmul.name
    return PlainLinear(name, matmul, a, w, parameter, is_opt_in(matmul))


def _is_weight(source: fx.Node, matmul: fx.Node) -> bool:
    """Tell ``F.linear`` and products with a parameter from products of two inputs."""
    if source.op == "get_attr" or matmul.target is aten.linear.default:
        return True
    known = source.meta.get(PARAMETER)
    if known is not None:
        return bool(known)
    calls = matmul.meta.get("source_fn_stack")
    called_as = calls[-1][1] if calls else None
    return called_as in (None, torch.nn.Linear, torch.nn.functional.linear)


# From a weight to its product there are a cast, a dequantisation and their views.
_MAX_WEIGHT_NODES = 64


def linear_name(matmul: fx.Node) -> str:
    """Name of the linear that a matrix product is: of its module, or without one of its weight."""
    module, weight = module_path(matmul), _weight_of(matmul)
    return module if weight is None else weight.linear_in(module)


def is_opt_in(matmul: fx.Node) -> bool:
    """Is it, in no module of its own, a product with the weight of an embedding or the head?"""
    module, weight = module_path(matmul), _weight_of(matmul)
    if weight is None:
        return not module and any(map(_is_looked_up, _weight_inputs(matmul) or ()))
    looked_up = weight.opt_in or any(map(_is_looked_up, _weight_inputs(matmul) or ()))
    return looked_up and module not in weight.linears


def _is_looked_up(parameter: fx.Node) -> bool:
    return any(is_call(user, (aten.embedding.default,)) for user in parameter.users)


def _weight_of(matmul: fx.Node) -> Weight | None:
    """The weight that alone makes a product's second matrix; None of any other."""
    found = {node.meta.get(WEIGHT) for node in _weight_inputs(matmul) or ()}
    return found.pop() if len(found) == 1 else None


def _weight_inputs(matmul: fx.Node) -> set[fx.Node] | None:
    """The tensors among a graph's inputs that a product's second matrix is made of.

    None where they are many nodes away.
    """
    operand = matmul.args[LINEAR_OPERANDS.get(matmul.target, (0, 1))[1]]
    if not isinstance(operand, fx.Node) or (value := tensor_of(operand)) is None or value.ndim != 2:
        return None
    found, seen, pending = set[fx.Node](), {operand}, [operand]
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and tensor_of(node) is not None:
            found.add(node)
        new = set(node.all_input_nodes) - seen
        seen |= new
        pending += new
        if len(seen) > _MAX_WEIGHT_NODES:
            return None
    return found


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
    """Every forward reader of ``output``'s elements, seen through views and float dtype casts."""
    found: list[Reader] = []
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(output, ())]
    while pending:
        node, path = pending.pop(0)
        at_node = casts.by_source.get(node, ())
        found += [Reader(path, cast.values, cast) for cast in at_node]
        for user in forward_users(node):
            if user.target is aten.sym_size.int or any(user in cast.nodes for cast in at_node):
                continue
            if is_view(user) or (is_dtype_cast(user) and not is_float8(user)):
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
        of_scales: those of them that hold nothing but scales.
        blocked_scales: the node that holds the scales in the 128x4 blocked layout for the matmul;
            None where the slice needs them in row-major order.
    """

    name: str
    matmul: fx.Node
    slice: tuple[fx.Node, ...]
    of_scales: frozenset[fx.Node] = frozenset()
    blocked_scales: fx.Node | None = None


@dataclass(frozen=True)
class CastUse:
    """Who reads a cast in the forward graph; ``escape`` reads it and is no matmul."""

    matmuls: tuple[QuantizedMatmul, ...] = ()
    escape: fx.Node | None = None


def cast_use(cast: Cast) -> CastUse:
    """Follow a cast's values and scales through dequantisation to the matmuls.

    Scales may be decoded by any pointwise ops. Once they multiply the values only layout and
    dtype may change: whatever else is computed from the product, such as an activation function
    or a straight-through estimator's sum, is no plain dequantisation.
    """
    inputs: dict[fx.Node, set[fx.Node]] = {}
    holds: dict[fx.Node, _Holds] = {cast.values: _Holds.VALUES, cast.scales: _Holds.SCALES}
    matmuls: dict[fx.Node, None] = {}
    # In graph order, so that a node's inputs are known before it is.
    queue = sorted(holds)
    while queue:
        node = heappop(queue)
        if node not in holds:
            held = _hold(node, holds)
            if held is None:
                return CastUse(escape=node)
            holds[node] = held
        for user in forward_users(node):
            if user in cast.nodes:
                # The cast itself reads its scales to scale the elements.
                continue
            if is_matmul(user):
                matmuls[user] = None
            elif user not in inputs and user not in holds:
                heappush(queue, user)
            inputs.setdefault(user, set()).add(node)
    return CastUse(tuple(_quantized_matmul(m, cast, inputs, holds) for m in matmuls))


def _quantized_matmul(
    matmul: fx.Node,
    cast: Cast,
    inputs: Mapping[fx.Node, set[fx.Node]],
    holds: Mapping[fx.Node, _Holds],
) -> QuantizedMatmul:
    nodes = _ancestors(matmul, inputs, (cast.values, cast.scales))
    of_scales = frozenset(n for n in nodes if holds[n] is _Holds.SCALES)
    operands = [n for n in inputs[matmul] if n in of_scales]
    blocked = operands[0] if len(operands) == 1 and is_blocked(cast.scales, operands[0]) else None
    name = linear_name(matmul) or matmul.name
    return QuantizedMatmul(name, matmul, nodes, of_scales, blocked)


class _Holds(Enum):
    """What a node of a dequantisation is made of."""

    VALUES = auto()
    SCALES = auto()
    PRODUCT = auto()


def _hold(node: fx.Node, holds: Mapping[fx.Node, _Holds]) -> _Holds | None:
    """What ``node`` is made of, None if it is no step of a dequantisation."""
    # Symbolic sizes are inputs too.
    inputs = [n for n in node.all_input_nodes if tensor_of(n) is not None]
    known = {holds.get(n) for n in inputs if n in holds or not _is_constant(n)}
    if known == {_Holds.VALUES, _Holds.SCALES}:
        return _Holds.PRODUCT if is_call(node, PRODUCTS) else None
    if len(known) != 1:
        return None
    held = known.pop()
    if is_view(node) or is_call(node, _LAYOUT) or _is_conversion(node):
        return held
    tags = getattr(node.target, "tags", ())
    decodes = torch.Tag.pointwise in tags or is_call(node, _DECODING) or moves_bytes(node)
    return held if held is _Holds.SCALES and decodes else None


def _is_constant(node: fx.Node) -> bool:
    """A constant, or a part of one, such as the part of a padded tensor that is written to."""
    source = strip(node, is_view, _is_part)
    return is_call(source, _CONSTANTS) or source.op == "get_attr"


def _is_part(node: fx.Node) -> bool:
    return is_call(node, (aten.slice.Tensor,))


def _is_conversion(node: fx.Node) -> bool:
    return is_call(node, (prims.convert_element_type.default, aten._to_copy.default))


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


def is_float8(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype.itemsize == 1


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
    if len(others) != 1 or any(is_call(n, _LAYOUT) for n in values):
        return None
    weight = strip(others[0].source, is_view)
    value = tensor_of(weight)
    own = next(u for u in cast_use(others[0]).matmuls if u.matmul is matmul.matmul)
    # The channels must be what the matmul contracts: an odd number of transpositions of values,
    # the one that the op itself may do included.
    transpositions = sum(is_transpose(n) and n not in own.of_scales for n in own.slice)
    transpositions += _transposes_weight(matmul.matmul)
    if value is None or value.ndim != 2 or transpositions % 2 == 0:
        return None
    return WeightCast(others[0], weight, own.slice)


def narrowest_dtype(nodes: Iterable[fx.Node]) -> torch.dtype | None:
    """The one dtype below float32 among the nodes', float32 without any, None for several."""
    narrow = {t.dtype for t in map(tensor_of, nodes) if t is not None} - {torch.float32}
    return next(iter(narrow), torch.float32) if len(narrow) <= 1 else None


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
        if node in seen or _is_constant(node):
            continue
        seen.add(node)
        if node.op == "call_function":
            pending += node.all_input_nodes
        elif (value := tensor_of(node)) is not None and value.ndim > 1:
            found[type_name(node)] = None
    return " and ".join(found) or "a constant"
