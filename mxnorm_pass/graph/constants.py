"""Read numbers off a graph: literals, tensors that hold one number throughout, and float inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import aten, is_dtype_cast, is_expand, is_transpose, is_view

# Where each op that fills a tensor says with what.
_FILLS: dict[Any, Callable[[fx.Node], Any]] = {
    aten.full.default: lambda node: node.args[1],
    aten.full_like.default: lambda node: node.args[1],
    aten.new_full.default: lambda node: node.args[2],
    aten.scalar_tensor.default: lambda node: node.args[0],
    aten.ones.default: lambda node: 1,
    aten.ones_like.default: lambda node: 1,
    aten.new_ones.default: lambda node: 1,
    aten.zeros.default: lambda node: 0,
    aten.zeros_like.default: lambda node: 0,
    aten.new_zeros.default: lambda node: 0,
}
# A constant is a few ops away from the numbers that the model spells.
_DEPTH = 8


def constant_of(arg: Any, depth: int = _DEPTH) -> float | None:
    """The number that an argument is, or that every element of a node's tensor is, if known."""
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return float(arg)
    if not isinstance(arg, fx.Node) or depth == 0:
        return None
    if arg.op == "get_attr":
        return _attribute(arg)
    if arg.target in _FILLS:
        return constant_of(_FILLS[arg.target](arg), depth - 1)
    if is_view(arg) or is_dtype_cast(arg) or is_expand(arg) or is_transpose(arg):
        return constant_of(arg.args[0], depth - 1)
    if is_pointwise(arg) and not arg.kwargs:
        return _computed(arg, depth)
    return None


def is_filled(node: fx.Node) -> bool:
    """Is it an attribute of the graph, or a tensor that is filled with a number?"""
    return node.op == "get_attr" or node.target in _FILLS


def float_inputs(arg: Any) -> tuple[fx.Node, ...]:
    """The Python floats that a number is computed from, where it is nothing but such.

    Under ``dynamic=True`` Dynamo makes them inputs of the graph, each a tensor of float64 without
    dimensions. The backend can ask for their values.
    """
    found: dict[fx.Node, None] = {}
    pending = [arg] if isinstance(arg, fx.Node) else []
    for _ in range(2 * _DEPTH):
        if not pending:
            break
        node = pending.pop()
        if constant_of(node) is not None:
            continue
        if not _is_number(node):
            return ()
        if node.op == "placeholder":
            found[node] = None
        pending += node.all_input_nodes
    return () if pending else tuple(found)


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    is_float = value.dtype == torch.float64 or node.op == "call_function"
    return value.ndim == 0 and is_float


def is_pointwise(node: fx.Node) -> bool:
    """Does the call compute each element from those at its place, and the same each time?"""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _attribute(node: fx.Node) -> float | None:
    owner = node.graph.owning_module
    value = operator.attrgetter(str(node.target))(owner) if owner is not None else None
    if not isinstance(value, Tensor) or value.numel() != 1 or is_fake(value):
        return None
    with real_tensors():
        return float(value.item()) if value.dtype.is_floating_point else None


def _computed(node: fx.Node, depth: int) -> float | None:
    """In float64, so that the number is the one that the model spells."""
    known = [constant_of(arg, depth - 1) for arg in node.args]
    if None in known:
        return None
    with real_tensors():
        args = [
            torch.tensor(number, dtype=torch.float64) if isinstance(arg, fx.Node) else number
            for arg, number in zip(node.args, known, strict=True)
        ]
        try:
            value = node.target(*args)  # type: ignore[operator]
        except (RuntimeError, TypeError):
            return None
        return float(value.item()) if value.dtype.is_floating_point else None
