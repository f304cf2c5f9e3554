"""Linears of few rows that read one x become one call: queries, keys and values; gate and up."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._inductor.virtualized import V

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call
from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.ops.mx_linear import FewRowsCall, MXLinearCall


@dataclass(frozen=True)
class FewRows:
    """A linear that a kernel runs, or may run at run time."""

    node: fx.Node
    linear: MXLinearCall

    @property
    def reads(self) -> tuple[Any, ...]:
        """Those of which it is equal are one call."""
        of = self.linear
        formats = (of.x_format.name, of.weight_format.name)
        return of.x, of.x_scales, *formats, of.dtype, of.bias is None


def few_rows(node: fx.Node, linear: MXLinearCall) -> FewRows | str:
    """What runs the linear, or why it is for a matmul of what is widened first."""
    if linear.x_tensor_scale is not None or linear.weight_tensor_scale is not None:
        return "there are tensor scales, which the kernel does not read"
    ours = FewRowsCall.of(None, _tensors(_arguments([linear])))
    reason = ours.why_never()
    if reason is not None:
        return reason
    if V.aot_compilation and ours.rows != 1:
        return "a compiled program cannot launch the kernel of more than one row"
    return FewRows(node, linear)


def write_few_rows(graph: fx.Graph, found: Iterable[FewRows]) -> None:
    """Replace the linears, those of one x by one call where the first of them stands."""
    by_reads: dict[tuple[Any, ...], list[list[FewRows]]] = {}
    for one in found:
        groups = by_reads.setdefault(one.reads, [])
        for group in groups:
            if _move_operands(one, group[0].node):
                group.append(one)
                break
        else:
            groups.append([one])
    for groups in by_reads.values():
        for group in groups:
            _write(graph, group)


def _move_operands(one: FewRows, first: fx.Node) -> bool:
    """Put before ``first`` what the linear's weight is made of; False if it cannot stand there."""
    of = one.linear
    needed = {n for n in (of.weight, of.weight_scales, of.bias) if isinstance(n, fx.Node)}
    behind, node = [], one.node.prev
    while node is not first:
        if node in needed:
            # Linears themselves stay: each may be in a group, and become a result of its call.
            if node.is_impure() or node.target is ops.mx_linear:
                return False
            needed |= set(node.all_input_nodes)
            behind.append(node)
        node = node.prev
    if first in needed:
        return False
    for node in reversed(behind):
        first.prepend(node)
    return True


def _write(graph: fx.Graph, group: list[FewRows]) -> None:
    first = group[0].node
    with graph.inserting_before(first):
        arguments = _arguments([one.linear for one in group])
        results = call(graph, first, ops.few_rows_mx_linears, *arguments)
        for i, one in enumerate(group):
            y = call(graph, one.node, operator.getitem, results, i)
            one.node.replace_all_uses_with(y)
            # By which an exported program knows its outputs.
            name = one.node.name
            if one.node is not first:
                graph.erase_node(one.node)
            y.name = name
    graph.erase_node(first)


def _arguments(linears: list[MXLinearCall]) -> tuple[Any, ...]:
    of = linears[0]
    return (
        of.x,
        of.x_scales,
        [linear.weight for linear in linears],
        [linear.weight_scales for linear in linears],
        [linear.bias for linear in linears],
        of.x_format.name,
        of.weight_format.name,
        of.dtype,
    )


def _tensors(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    tensors: tuple[torch.Tensor, ...] = fx.map_arg(arguments, tensor_of)
    return tensors
