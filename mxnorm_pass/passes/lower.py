"""Put in the place of each op of this package what Inductor is to compile: a kernel or ATen ops.

A kernel becomes a ``triton_kernel_wrapper_functional`` node, which Inductor launches from its own
wrapper, without the dispatcher. Where values and scales of a norm are only read to be dequantised,
as emulated matmuls do, the kernel writes the dequantised values instead::

    x -> norm_cast -> values, scales -> dequantize -> y    =>    x -> kernel -> y

Linears on MX operands are opened before, see ``lower_mx_linears``: so their activation, too, is
only read to be dequantised. A checkpointed region's forward makes casts along T that its
recomputation makes again; there they are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import fx
from torch._subclasses.functional_tensor import dispatch_functionalize

from mxnorm_pass import ops
from mxnorm_pass.graph.build import unwrap_constants
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.numerics.formats import block_format
from mxnorm_pass.ops.define import KernelCall
from mxnorm_pass.passes.dequantized import dequantized_dtype, dequantizing_readers
from mxnorm_pass.passes.lower_mx_linears import lower_mx_linears
from mxnorm_pass.passes.lower_operands import lower_operand_casts

log = logging.getLogger(__name__)


def lower(graph: fx.Graph, decompositions: Mapping[Any, Any]) -> int:
    """Replace every op of this package in ``graph``, by a kernel if one can; returns how many."""
    drop_unread_casts(graph)
    unwrap_constants(graph)
    tracer = FunctionTracer(decompositions)
    # First: norms' kernels then find that their readers want widened rows.
    lowered = lower_mx_linears(graph, tracer)
    lowered += lower_operand_casts(graph, tracer)
    for overload, make_call in _kernel_calls():
        for node in graph.find_nodes(op="call_function", target=overload):
            if _is_called(node):
                continue
            reason = make_call(overload, values_of(node)).why_no_kernel()
            if reason is not None:
                log.debug("%s is decomposed: %s", node.name, reason)
            else:
                _insert_kernel(graph, node, tracer)
                lowered += 1
    return lowered + decompose(graph, decompositions)


def _is_called(node: fx.Node) -> bool:
    asked = ops.OPS[node.target].is_called
    return asked is not None and asked(values_of(node))


def values_of(node: fx.Node) -> list[Any]:
    """The arguments, with fake tensors."""
    values: list[Any] = list(fx.map_arg(node.args, lambda argument: argument.meta["val"]))
    return values


def _kernel_calls() -> list[tuple[Any, Callable[..., KernelCall]]]:
    return [(overload, op.call) for overload, op in ops.OPS.items() if op.call is not None]


def drop_unread_casts(graph: fx.Graph) -> None:
    """Replace ops that cast along D and T by those along D where nobody reads the other."""
    for overload, op in ops.OPS.items():
        narrower = op.along_rows_only
        if narrower is None:
            continue
        count = len(narrower._schema.returns)
        weight = [argument.name for argument in overload._schema.arguments].index("weight")
        for node in graph.find_nodes(op="call_function", target=overload):
            along_t = [getitem for getitem in node.users if getitem.args[1] >= count]
            if any(getitem.users for getitem in along_t):
                continue
            for getitem in along_t:
                graph.erase_node(getitem)
            names = [argument.name for argument in narrower._schema.arguments]
            args, gain_in_rows = list(node.args[: len(names)]), node.args[len(names)]
            if not gain_in_rows:
                args[weight] = None
            outputs = node.meta["val"][:count]
            node.target, node.args, node.meta["val"] = narrower, tuple(args), outputs


def decompose(graph: fx.Graph, decompositions: Mapping[Any, Any]) -> int:
    """Replace every op of this package in ``graph`` by its ATen ops; returns how many."""
    tracer = FunctionTracer(decompositions)
    replaced = 0
    for overload, op in ops.OPS.items():
        for node in graph.find_nodes(op="call_function", target=overload):
            if _is_called(node) or (op.stays_whole and op.stays_whole(values_of(node))):
                continue
            _replace(graph, node, tracer.graft(graph, node, op.reference, node.args))
            replaced += 1
    return replaced


def _insert_kernel(graph: fx.Graph, node: fx.Node, tracer: FunctionTracer) -> None:
    dequantized = _dequantized(node)
    dtype = dequantized_dtype(dequantized)
    results = tracer.graft(graph, node, _kernel(node.target, dtype), node.args)
    if dequantized:
        values, scales = _value_positions(node.target)
        for reader in dequantized:
            reader.replace_all_uses_with(results[values])
            graph.erase_node(reader)
        # The kernel returns one tensor in the place of two.
        results = (*results[: values + 1], None, *results[scales:])
    _replace(graph, node, results)


def _value_positions(op: Any) -> tuple[int, int]:
    names = [result.name for result in op._schema.returns]
    return names.index("values"), names.index("scales")


def _dequantized(node: fx.Node) -> list[fx.Node]:
    """Those that alone read the op's values and scales, if it casts, to undo its cast."""
    if len(node.target._schema.returns) == 1:  # type: ignore[union-attr]
        return []
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    written, scale = (node.args[names.index(name)] for name in ("format", "tensor_scale"))
    return dequantizing_readers(node, _value_positions(node.target), block_format(written), scale)  # type: ignore[arg-type]


@cache
def _kernel(op: Any, dequantize: Any) -> Callable[..., Any]:
    """``op`` as a kernel, traced without mutation: results are returned, not written into."""

    make_call = ops.OPS[op].call
    assert make_call is not None

    def run(*args: Any) -> Any:
        return make_call(op, args).run_kernel(dequantize)

    functional: Callable[..., Any] = dispatch_functionalize(run)
    return functional


def _replace(graph: fx.Graph, node: fx.Node, outputs: Any) -> None:
    """Let the readers of an op read ``outputs``, one node per result of the op.

    The node of a single result keeps the op's name, by which an exported program knows its outputs.
    """
    if isinstance(outputs, (tuple, list)):
        for getitem in list(node.users):
            output = outputs[getitem.args[1]]  # type: ignore[index]
            if output is not None:
                getitem.replace_all_uses_with(output)
            graph.erase_node(getitem)
    else:
        node.replace_all_uses_with(outputs)
    graph.erase_node(node)
    if isinstance(outputs, fx.Node):
        outputs.name = node.name
