"""Let all that reads an estimate read that of the fused op."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import stable_topological_sort

from mxnorm_pass import ops
from mxnorm_pass.graph.build import constant
from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import is_view
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.numerics.norm import Gradient, inverse_rms, inverse_rms_vjp
from mxnorm_pass.passes.match.fusion import Fusion


def share_rho(
    graph: fx.Graph,
    fusion: Fusion,
    rho: fx.Node,
    block_weights: fx.Node | None,
    tracer: FunctionTracer,
) -> None:
    """Let all that reads the estimate, the backward above all, read the fused op's."""
    for derivative in _derivatives(fusion.norm.anchor):
        _expand_derivative(graph, derivative, block_weights, tracer)
    fusion.norm.anchor.replace_all_uses_with(rho)
    late = [n for n in rho.args[0].all_input_nodes if n > rho]  # type: ignore[union-attr]
    if late or any(user < rho for user in rho.users):
        # Such as a gain of 1 + w, or a tensor's scale, which come after the statistic.
        stable_topological_sort(graph)


def _derivatives(estimate: fx.Node) -> list[fx.Node]:
    """The nodes that differentiate an ``inverse_rms`` node."""
    found, pending = [], [estimate]
    while pending:
        for user in pending.pop().users:
            if user.target is ops.inverse_rms_backward:
                found.append(user)
            elif is_view(user):
                pending.append(user)
    return found


def expand_estimates(graph: fx.Graph, tracer: FunctionTracer) -> None:
    """Write out what is left of ``inverse_rms`` and its derivative."""
    for node in graph.find_nodes(op="call_function", target=ops.inverse_rms_backward):
        _expand_derivative(graph, node, _weights_of(graph, node), tracer)
    for node in graph.find_nodes(op="call_function", target=ops.inverse_rms):
        x, _, *options = node.args
        new = tracer.graft(graph, node, _inverse_rms, (x, _weights_of(graph, node), *options))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _weights_of(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    weights = node.args[names.index("block_weights")]
    if weights is None:
        return None
    with real_tensors():
        values = torch.tensor(weights, dtype=torch.float32)
    with graph.inserting_before(node):
        return constant(graph, node, values)


def _inverse_rms(
    x: Tensor, weights: Tensor | None, eps: float, p: float, block_size: int, gradient: Gradient
) -> Tensor:
    return inverse_rms(x, eps=eps, p=p, block_size=block_size, block_weights=weights)


def _expand_derivative(
    graph: fx.Graph, node: fx.Node, block_weights: fx.Node | None, tracer: FunctionTracer
) -> None:
    grad, x, rho, _, *options = node.args
    args = (grad, x, rho, block_weights, *options)
    node.replace_all_uses_with(tracer.graft(graph, node, _inverse_rms_vjp, args))
    graph.erase_node(node)


def _inverse_rms_vjp(
    grad: Tensor,
    x: Tensor,
    rho: Tensor,
    weights: Tensor | None,
    eps: float,
    p: float,
    block_size: int,
    gradient: Gradient,
) -> Tensor:
    return inverse_rms_vjp(
        x,
        rho,
        grad,
        eps=eps,
        p=p,
        block_size=block_size,
        block_weights=weights,
        gradient=gradient,
    )


def block_weights(graph: fx.Graph, fusion: Fusion, at: fx.Node) -> fx.Node | None:
    """The calibration's weights as a constant of the graph, before all that may read it."""
    if fusion.block_weights is None:
        return None
    with graph.inserting_before(at):
        return constant(graph, fusion.norm.output, fusion.block_weights)
