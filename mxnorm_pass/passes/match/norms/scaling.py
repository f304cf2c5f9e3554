"""Find what divides a tensor by the norm of its own rows, whatever ops spell the norm.

Each product of a tensor with one number per row is a candidate. The number counts if it is computed
from the rows of that tensor alone and, by evaluation, is an inverse of their norm, see ``radial``.
The tensor may be scaled by constants and a gain on its way into the product, or it is multiplied
with a matrix first: then the norm is applied after the linear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from torch import fx

from mxnorm_pass.graph.constants import constant_of, float_inputs
from mxnorm_pass.graph.matmul import LINEAR_OPERANDS
from mxnorm_pass.graph.nodes import (
    aten,
    forward_users,
    is_backward,
    is_call,
    is_dtype_cast,
    is_expand,
    is_view,
    same_shape,
    same_size,
    strip,
    tensor_of,
)
from mxnorm_pass.passes.match.norms.inverse_rms import DIVISIONS, MULTIPLICATIONS, is_per_channel
from mxnorm_pass.passes.match.norms.layer_norm import centered
from mxnorm_pass.passes.match.norms.radial import InverseNorm, inverse_norm
from mxnorm_pass.passes.match.norms.row_program import RowProgram

_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_PARTS = frozenset({aten.slice.Tensor, aten.select.int})
# From a linear to the norm's product there are few steps.
_MAX_STEPS = 16


@dataclass(frozen=True)
class Operand:
    """A tensor on its way into a product.

    Attributes:
        x: the tensor.
        factor, gain: by which it is multiplied, a number and [D].
        float_inputs: the graph inputs from which another such number is computed.
        nodes: from x (excluded) to the product (excluded).
        linear: the matmul whose activation x is; None where x itself is multiplied.
    """

    x: fx.Node
    factor: float = 1.0
    gain: fx.Node | None = None
    float_inputs: tuple[fx.Node, ...] = ()
    nodes: tuple[fx.Node, ...] = ()
    linear: fx.Node | None = None


@dataclass(frozen=True)
class Scaling:
    """A product of ``operand`` with an inverse norm of the rows of its x.

    Attributes:
        program: computes the number per row.
        inverse: what the number is, with the operand's factor in it.
        is_centered: x is a tensor without its mean, and the norm that of the differences.
        gains: [D], those that are multiplied before or in the product.
    """

    product: fx.Node
    operand: Operand
    program: RowProgram
    inverse: InverseNorm
    is_centered: bool
    gains: tuple[fx.Node, ...]

    @property
    def x(self) -> fx.Node:
        return self.operand.x

    @property
    def number(self) -> fx.Node:
        """The first node with one number per row."""
        return next((n for n in self.program.nodes if _is_per_row(n, self.x)), self.product)

    @property
    def anchor(self) -> fx.Node:
        """What tells the norm from others: one of x may have its number, too, after a linear."""
        return self.number if self.operand.linear is None else self.product

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Graph inputs of one number each that enter."""
        return (*self.program.scalars, *self.operand.float_inputs)

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """From x (excluded) to the product (included); no views and casts of x that others read."""
        nodes = {*self.program.nodes, *self.operand.nodes, self.product}
        for node in self.program.leaves:
            while node is not self.x and (is_view(node) or is_dtype_cast(node)):
                if not nodes.issuperset(forward_users(node)):
                    break
                nodes.add(node)
                node = node.args[0]  # type: ignore[assignment]
        return frozenset(nodes)


@dataclass(frozen=True)
class _Factor:
    """One number per row that an operand is multiplied with, or divided by."""

    node: fx.Node
    divides: bool
    gain: fx.Node | None


def find_scalings(graph: fx.Graph, known: Collection[fx.Node]) -> Iterator[Scaling]:
    """All products with an inverse norm in the forward graph, in order.

    Args:
        known: nodes of norms that were found. Another product with the same number is the same
            norm, computed again, unless it is applied after a linear.
    """
    taken = set(known)
    targets = (aten.mul.Tensor, aten.div.Tensor)
    products = [n for t in targets for n in graph.find_nodes(op="call_function", target=t)]
    for node in sorted(products):
        if node in taken or is_backward(node):
            continue
        for scaled, factor in _products(node):
            found = next(_scalings(node, scaled, factor), None)
            if found is not None:
                if found.operand.linear is not None or taken.isdisjoint(found.nodes):
                    yield found
                    taken |= found.nodes
                break


def _products(node: fx.Node) -> Iterator[tuple[fx.Node, _Factor]]:
    """Each way to read the node as a tensor [..., D] times a number per row."""
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return
    divides = node.target is aten.div.Tensor
    for scaled, by in [(first, second)] if divides else [(first, second), (second, first)]:
        factor = _per_row(by, scaled, divides)
        if factor is not None:
            yield scaled, factor


def _per_row(node: fx.Node, scaled: fx.Node, divides: bool) -> _Factor | None:
    node = strip(node, is_expand, is_dtype_cast)
    if _is_per_row(node, scaled):
        return _Factor(node, divides, None)
    if divides or not is_call(node, MULTIPLICATIONS):
        return None
    for number, gain in (node.args[:2], node.args[1::-1]):
        value = tensor_of(gain) if isinstance(gain, fx.Node) else None
        if value is None or not isinstance(number, fx.Node) or not value.ndim:
            continue
        if is_per_channel(gain, value.shape[-1]) and _is_per_row(number, scaled):
            return _Factor(number, divides, gain)  # type: ignore[arg-type]
    return None


def _is_per_row(node: fx.Node, scaled: fx.Node) -> bool:
    """Is it one number per row of [..., D], which does not come straight from outside?"""
    own, value = tensor_of(strip(node, is_expand)), tensor_of(scaled)
    if own is None or value is None or value.ndim < 2 or same_size(value.shape[-1], 1):
        return False
    if strip(node, is_expand, is_view, is_dtype_cast).op != "call_function":
        return False
    return same_shape(own.shape, (*value.shape[:-1], 1))


def _scalings(product: fx.Node, scaled: fx.Node, factor: _Factor) -> Iterator[Scaling]:
    for operand in (*_peeled(Operand(scaled)), *_activations(scaled)):
        source = centered(operand.x)
        program = RowProgram.of(factor.node, operand.x)
        if program is None and source is not None:
            program = RowProgram.of(factor.node, source)
        else:
            source = None
        if program is None:
            continue
        inverse = inverse_norm(program, factor.divides, source is not None)
        if inverse is None:
            return
        inverse = replace(inverse, factor=inverse.factor * operand.factor)
        gains = tuple(gain for gain in (operand.gain, factor.gain) if gain is not None)
        is_centered = centered(operand.x) is not None
        yield Scaling(product, operand, program, inverse, is_centered, gains)


def _peeled(operand: Operand) -> Iterator[Operand]:
    """The operand, then what it is made of by constants, one gain, dtype casts and views."""
    for _ in range(_MAX_STEPS):
        yield operand
        node = operand.x
        inner = _without_factor(operand) or _without_gain(operand)
        if inner is None and (is_dtype_cast(node) or _keeps_rows(node)):
            inner = replace(operand, x=node.args[0])  # type: ignore[arg-type]
        if inner is None:
            return
        operand = replace(inner, nodes=(*operand.nodes, node))


def _without_factor(operand: Operand) -> Operand | None:
    node = operand.x
    if is_call(node, (aten.neg.default,)):
        return replace(operand, x=node.args[0], factor=-operand.factor)  # type: ignore[arg-type]
    if not is_call(node, MULTIPLICATIONS | DIVISIONS):
        return None
    first, second = node.args[:2]
    is_number = constant_of(first) is not None or float_inputs(first)
    if node.target in MULTIPLICATIONS and is_number:
        first, second = second, first
    number = constant_of(second)
    if not isinstance(first, fx.Node):
        return None
    if number is None:
        inputs = float_inputs(second)
        known = (*operand.float_inputs, *inputs)
        return replace(operand, x=first, float_inputs=known) if inputs else None
    if node.target in DIVISIONS:
        number = 1 / number if number else 0.0
    return replace(operand, x=first, factor=operand.factor * number)


def _without_gain(operand: Operand) -> Operand | None:
    node = operand.x
    value = tensor_of(node)
    if value is None or operand.gain is not None or not is_call(node, MULTIPLICATIONS):
        return None
    for x, gain in (node.args[:2], node.args[1::-1]):
        if isinstance(x, fx.Node) and is_per_channel(gain, value.shape[-1]):
            return replace(operand, x=x, gain=gain)  # type: ignore[arg-type]
    return None


def _keeps_rows(node: fx.Node) -> bool:
    """Is it a view with rows of the same width?"""
    if not is_view(node):
        return False
    source, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    if source is None or result is None or not source.ndim or not result.ndim:
        return False
    return same_size(source.shape[-1], result.shape[-1])


def _activations(node: fx.Node) -> Iterator[Operand]:
    """What a linear reads whose result, but for views, biases, numbers and parts, the node is."""
    for _ in range(_MAX_STEPS):
        if is_call(node, LINEAR_OPERANDS):
            activation = node.args[LINEAR_OPERANDS[node.target][0]]
            if isinstance(activation, fx.Node):
                yield from _peeled(Operand(activation, linear=node))
            return
        inner = _linear_part(node)
        if inner is None:
            return
        node = inner


def _linear_part(node: fx.Node) -> fx.Node | None:
    if is_view(node) or is_dtype_cast(node) or is_call(node, _PARTS):
        return node.args[0]  # type: ignore[return-value]
    if not is_call(node, _SUMS | MULTIPLICATIONS | DIVISIONS):
        return None
    value = tensor_of(node)
    for inner, other in (node.args[:2], node.args[1::-1]):
        is_bias = constant_of(other) is not None or _is_scalar(other)
        is_bias = is_bias or (value is not None and is_per_channel(other, value.shape[-1]))
        if isinstance(inner, fx.Node) and is_bias:
            return inner
    return None


def _is_scalar(arg: object) -> bool:
    value = tensor_of(arg) if isinstance(arg, fx.Node) else None
    return value is not None and value.ndim == 0
