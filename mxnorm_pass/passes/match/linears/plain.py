"""Linears on high-precision operands, and the names of linears."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass.graph.inputs import PARAMETER, WEIGHT
from mxnorm_pass.graph.matmul import LINEAR_OPERANDS
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import (
    aten,
    is_call,
    is_dtype_cast,
    is_transpose,
    is_view,
    strip,
    tensor_of,
)
from mxnorm_pass.graph.weights import Weight


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
        return transposes_weight(self.matmul)


def transposes_weight(matmul: fx.Node) -> bool:
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
