"""Give the fused readers of a norm its estimate, in Dynamo's graph, for autograd to differentiate.

Before::

    x, gain -> norm -> y -> steps -> fused readers
                       +-----------> all others

After::

    x, gain -> norm -> y ----------------------------------------------> all others
    x -> float32 -> inverse_rms -> * x -> dtype -> * gain -> dtype -> steps -> fused readers

The estimate rounds where the norm rounds: it is ``functional.mxnorm``, op by op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import same_shape
from mxnorm_pass.passes.before_autograd.provenance import example_value
from mxnorm_pass.passes.before_autograd.substitution import Substitution

# What later stages read of a node of Dynamo's: where it comes from.
_ORIGIN = ("nn_module_stack", "source_fn_stack", "stack_trace", "custom")


def substitute(substitution: Substitution) -> None:
    """Edit the substitution into its scope's graph, in place."""
    s = substitution
    graph = s.scope.gm.graph
    normalized = _normalized(graph, s)
    estimate = _estimate(graph, s, normalized)
    renewed = {s.output: estimate}
    for step in s.steps:
        with graph.inserting_after(step):
            renewed[step] = graph.node_copy(step, lambda n: renewed.get(n, n))
    for reader in s.readers:
        for holder, new in renewed.items():
            reader.replace_input_with(holder, new)


def _normalized(graph: fx.Graph, s: Substitution) -> fx.Node:
    """x / rms~ in front of the first of the norm's own reads of x."""
    e = s.estimate
    weights = None if e.block_weights is None else list(e.block_weights)
    options = (weights, e.eps, e.p, e.block_size, e.gradient)
    with graph.inserting_before(s.x_reader):
        x = _to_dtype(graph, s.statistic, s.x, torch.float32)
        rho = _call(graph, s.statistic, ops.inverse_rms, x, *options)
        # By this name it is found again once the graph is traced.
        stack = rho.meta.get("nn_module_stack", {})
        rho.meta["nn_module_stack"] = {**stack, "mxnorm_pass": (e.norm, nn.Module)}
        normalized = _call(graph, s.statistic, torch.mul, x, rho)
        return _to_dtype(graph, s.statistic, normalized, e.norm_dtype)


def _estimate(graph: fx.Graph, s: Substitution, normalized: fx.Node) -> fx.Node:
    """The norm's output by estimate, in the dtype and shape of the output that it stands for."""
    result = normalized
    if s.gain is not None and s.gain_reader is not None:
        late = max(s.gain_reader, s.x_reader, key=s.scope.nodes.index)
        with graph.inserting_before(late):
            gain = s.gain
            if _value(gain).ndim != 1:
                gain = _call(graph, s.output, torch.reshape, gain, (-1,))
            result = _call(graph, s.output, torch.mul, result, gain)
    like = _value(s.output)
    # Behind the output, with whose shape it may have to be.
    with graph.inserting_before(s.output.next):
        result = _to_dtype(graph, s.output, result, like.dtype)
        if not same_shape(_value(result).shape, like.shape):
            result = _call(graph, s.output, torch.Tensor.reshape_as, result, s.output)
    return result


def _to_dtype(
    graph: fx.Graph, origin: fx.Node, node: fx.Node, dtype: torch.dtype | None
) -> fx.Node:
    if dtype is None or _value(node).dtype == dtype:
        return node
    return _call(graph, origin, torch.Tensor.to, node, dtype)


def _call(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call at the insertion point that comes from where ``origin`` comes from."""
    node = graph.call_function(target, args)
    for key in _ORIGIN:
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    values = fx.map_arg(args, _value)
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode, torch.no_grad():
        node.meta["example_value"] = target(*values)
    return node


def _value(node: fx.Node) -> Tensor:
    value = example_value(node)
    assert value is not None, f"{node} holds no tensor"
    return value
