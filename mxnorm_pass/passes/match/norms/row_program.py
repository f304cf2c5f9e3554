"""Nodes of a graph as a function of one row of a tensor, to find out by evaluation what it is.

The rows of a tensor [..., D] are all but its last dimension. Where all is computed row by row, each
shape begins with the rows; their number is taken out, so that the nodes run on any [N, D], and
equal spellings are equal programs. All runs in float64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.constants import constant_of, is_filled, is_pointwise
from mxnorm_pass.graph.matmul import is_product
from mxnorm_pass.graph.nodes import (
    aten,
    is_backward,
    is_call,
    is_dtype_cast,
    is_expand,
    is_view,
    prims,
    same_shape,
    same_size,
    same_value,
    strip,
    tensor_of,
)

_MAX_NODES = 48
# What stands for a symbolic width, and for a graph input that holds one number.
_ANY_WIDTH = 96
_ANY_NUMBER = 2.0**-9
_PERMUTATIONS = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
_CONVERSIONS = frozenset({prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype})
# Ops take these for their results; all is float64 here.
_IGNORED = frozenset({"dtype", "device", "layout", "pin_memory", "memory_format", "non_blocking"})


@dataclass(frozen=True)
class _Result:
    """Reference to the rows or to a step's result."""

    index: int


@dataclass(frozen=True)
class _Shape:
    """A shape that begins with the rows: ``ones`` times 1, then their number, then ``own``."""

    ones: int
    own: tuple[int, ...]

    def of(self, rows: int) -> tuple[int, ...]:
        return (*(1,) * self.ones, rows, *self.own)


@dataclass(frozen=True)
class _Step:
    """One node as a function of the rows and the results before it.

    Attributes:
        shape: of the result; None where it is no tensor, or has no rows.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    shape: _Shape | None = None


@dataclass(frozen=True)
class RowProgram:
    """How one number per row is computed from the rows. Equal programs are equal spellings.

    Attributes:
        width: elements of a row.
        nodes: all that is computed from the rows, the result included, in topological order.
        leaves: the nodes that hold the rows.
        scalars: graph inputs of one number each that enter, too.
    """

    width: int
    steps: tuple[_Step, ...]
    nodes: tuple[fx.Node, ...] = field(compare=False)
    leaves: tuple[fx.Node, ...] = field(compare=False)
    scalars: tuple[fx.Node, ...] = field(compare=False)

    @classmethod
    def of(cls, result: fx.Node, x: fx.Node) -> RowProgram | None:
        """The program from x [..., D] to a result with one number per row.

        None where it reads anything but x, constants and single numbers, or is no such result.
        """
        rows = _Rows.of(x)
        if rows is None or rows.shape_of(result) is None:
            return None
        order = rows.nodes_to(result)
        writer = _Writer(rows)
        if order is None or not all(map(writer.add, order)):
            return None
        leaves = tuple(filter(rows.is_leaf, order))
        scalars = tuple(writer.scalars)
        nodes = tuple(node for node in order if node not in (*leaves, *scalars))
        return cls(rows.width, tuple(writer.steps), nodes, leaves, scalars)

    def __call__(self, rows: Tensor) -> Tensor:
        """[N] for rows [N, D] in float64.

        Raises:
            RuntimeError, TypeError, ValueError, IndexError, NotImplementedError: as the ops do, or
                as a result does not have a row's shape.
        """
        known: list[Any] = [rows]

        def decode(arg: Any) -> Any:
            if isinstance(arg, _Result):
                return known[arg.index]
            if isinstance(arg, _Shape):
                return arg.of(len(rows))
            return [decode(a) for a in arg] if isinstance(arg, tuple) else arg

        for step in self.steps:
            result = step.function(
                *map(decode, step.args), **{k: decode(v) for k, v in step.kwargs}
            )
            if step.shape is not None and tuple(result.shape) != step.shape.of(len(rows)):
                raise ValueError(f"{step.function} returns {tuple(result.shape)}")
            known.append(result)
        return known[-1].reshape(len(rows))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Rows:
    """The rows of a tensor; ``size`` is their width in the graph, ``width`` in the program."""

    root: fx.Node
    count: Any
    size: Any
    width: int

    @classmethod
    def of(cls, x: fx.Node) -> _Rows | None:
        value = tensor_of(x)
        if value is None or value.ndim < 2:
            return None
        *lead, size = value.shape
        root = strip(x, _keeps_order, is_dtype_cast)
        return cls(root, math.prod(lead), size, size if isinstance(size, int) else _ANY_WIDTH)

    def shape_of(self, node: fx.Node) -> _Shape | None:
        """The node's shape, if it begins with the rows."""
        value = tensor_of(node)
        for end in range(1, (value.ndim if value is not None else 0) + 1):
            lead, own = value.shape[:end], value.shape[end:]  # type: ignore[union-attr]
            if same_size(math.prod(lead), self.count):
                sizes = tuple(self.width if self.is_width(size) else size for size in own)
                return _Shape(end - 1, sizes) if all(isinstance(n, int) for n in sizes) else None
        return None

    def is_width(self, size: Any) -> bool:
        return same_size(size, self.size)

    def is_leaf(self, node: fx.Node) -> bool:
        """Does the node hold these rows, or their width?"""
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            return self.is_width(size)
        shape = self.shape_of(node)
        if shape is None or math.prod(shape.own) != self.width:
            return False
        return same_value(strip(node, _keeps_order, is_dtype_cast), self.root)

    def nodes_to(self, result: fx.Node) -> list[fx.Node] | None:
        """What leads from the rows to the result, in topological order; None if it is too much."""
        order: dict[fx.Node, None] = {}
        constants: set[fx.Node] = set()
        visited = {result}
        stack = [(result, iter(_operands(result)))]
        while stack:
            node, operands = stack[-1]
            child = next(operands, None)
            if child is None:
                stack.pop()
                is_constant = node.all_input_nodes and constants.issuperset(node.all_input_nodes)
                if is_constant and constant_of(node) is not None:
                    constants.add(node)
                else:
                    order[node] = None
            elif child not in visited:
                visited.add(child)
                if is_filled(child) and constant_of(child) is not None:
                    constants.add(child)
                elif len(visited) > _MAX_NODES or is_backward(child) or _is_encoded(child):
                    return None
                else:
                    stack.append((child, iter(() if self.is_leaf(child) else _operands(child))))
        return list(order)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Operands, without the sizes that views take: their results have them."""
    reshapes = _keeps_order(node) or is_expand(node)
    return node.all_input_nodes[:1] if reshapes else node.all_input_nodes


def _is_encoded(node: fx.Node) -> bool:
    """Does it hold integers, as scales' exponents are computed with, or a quantised value?"""
    value = tensor_of(node)
    if value is None or value.dtype == torch.bool or value.dtype.is_complex:
        return False
    return not value.dtype.is_floating_point or value.dtype.itemsize == 1


def _keeps_order(node: fx.Node) -> bool:
    """Is it a view in row-major order? Of a single row, transpositions are."""
    if is_view(node) or not is_call(node, _PERMUTATIONS):
        return is_view(node)
    value, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    if value is None or result is None:
        return False
    sizes, moved = ([n for n in t.shape if not same_size(n, 1)] for t in (value, result))
    return len(sizes) <= 1 and same_shape(sizes, moved)


class _Writer:
    """Writes down nodes in topological order as the steps of a program."""

    def __init__(self, rows: _Rows) -> None:
        self.steps: list[_Step] = []
        self.scalars: list[fx.Node] = []
        self._rows = rows
        self._results: dict[fx.Node, _Result] = {}

    def add(self, node: fx.Node) -> bool:
        """False where it is not known what the node does to a row."""
        step = self._step(node)
        if step is None:
            return False
        self._results[node] = self._append(step)
        return True

    def _append(self, step: _Step) -> _Result:
        self.steps.append(step)
        return _Result(len(self.steps))

    def _step(self, node: fx.Node) -> _Step | None:
        if node.op == "placeholder" and _is_number(node):
            self.scalars.append(node)
            return _number(_ANY_NUMBER)
        shape = self._rows.shape_of(node)
        if self._rows.is_leaf(node):
            if shape is None:
                return _Step(int, (self._rows.width,))
            return _Step(torch.reshape, (_Result(0), shape), (), shape)
        if node.op != "call_function" or (shape is None and _has_dimensions(node)):
            return None
        if is_call(node, _CONVERSIONS):
            return self._conversion(node, shape)
        if _keeps_order(node) and shape is None:
            return _Step(Tensor.double, (self._read(node.args[0], node),))
        if _keeps_order(node) or is_expand(node):
            reshape = torch.reshape if _keeps_order(node) else Tensor.expand
            return _Step(reshape, (self._read(node.args[0], node), shape), (), shape)
        if not _is_evaluated(node):
            return None
        args = tuple(self._read(arg, node) for arg in node.args)
        kwargs = {k: self._read(v, node) for k, v in node.kwargs.items() if k not in _IGNORED}
        return _Step(node.target, args, tuple(kwargs.items()), shape)  # type: ignore[arg-type]

    def _conversion(self, node: fx.Node, shape: _Shape | None) -> _Step | None:
        """Floats of any precision are the same number here; bool becomes 0 or 1."""
        source, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
        if source is None or result is None or not result.dtype.is_floating_point:
            return None
        if result.dtype.itemsize == 1 or not (is_dtype_cast(node) or source.dtype == torch.bool):
            return None
        return _Step(Tensor.double, (self._read(node.args[0], node),), (), shape)

    def _read(self, arg: Any, reader: fx.Node) -> Any:
        if isinstance(arg, (list, tuple)):
            return tuple(self._read(a, reader) for a in arg)
        if not isinstance(arg, fx.Node):
            return arg
        if arg not in self._results:
            return self._append(self._constant(arg, reader))
        return self._results[arg]

    def _constant(self, node: fx.Node, reader: fx.Node) -> _Step:
        """A number where it meets each element, else the tensor."""
        number, value, shape = constant_of(node), tensor_of(node), self._rows.shape_of(node)
        assert number is not None and value is not None
        if is_pointwise(reader):
            return _number(number)
        # A matrix may happen to have as many rows as x.
        sizes = tuple(value.shape) if shape is None or is_product(reader) else shape
        return _Step(torch.full, (sizes, number), (("dtype", torch.float64),))


def _is_evaluated(node: fx.Node) -> bool:
    """May the op run on a CPU in place of what the graph is for, with the same result each time?"""
    if getattr(operator, getattr(node.target, "__name__", ""), None) is node.target:
        return True
    if getattr(node.target, "namespace", None) not in ("aten", "prims"):
        return False
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
    return not (is_random or node.target._schema.is_mutable)  # type: ignore[union-attr]


def _has_dimensions(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.ndim > 0


def _is_number(node: fx.Node) -> bool:
    value = tensor_of(node)
    if value is None:
        return isinstance(node.meta.get("val"), torch.SymFloat)
    return value.ndim == 0 and value.dtype.is_floating_point


def _number(number: float) -> _Step:
    return _Step(torch.tensor, (number,), (("dtype", torch.float64),))
