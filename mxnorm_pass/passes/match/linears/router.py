"""Tell a mixture-of-experts router from other linears: its output picks experts by top-k."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from torch import fx

from mxnorm_pass.graph.constants import constant_of
from mxnorm_pass.graph.matmul import is_product
from mxnorm_pass.graph.nodes import aten, forward_users, is_call, tensor_of
from mxnorm_pass.passes.match.linears.plain import PlainLinear, plain_linear
from mxnorm_pass.passes.match.norms.inverse_rms import is_per_channel

_PICKS = frozenset({aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.cat.default})
# Routers are a handful of ops away from their top-k: softmax or sigmoid, a bias, groups.
_MAX_STEPS = 96
# A router is a small MLP at most, and a vocabulary to choose a token from is no set of experts.
_MAX_LINEARS = 4
_MAX_EXPERTS = 1024


@dataclass(frozen=True)
class _Reached:
    """How a node was reached from the first linear.

    Attributes:
        linears: how many linears lie behind it, the first included.
        is_mixed: something that the first linear did not compute was added to it.
    """

    linears: int
    is_mixed: bool = False


def is_router(linear: PlainLinear) -> bool:
    """Do the linear's logits reach a top-k, be it through further linears of a small MLP?

    Which experts a token visits is a discrete choice that low precision flips; routers are kept in
    high precision throughout the field. The MLP ends where a residual stream or another product,
    such as attention, takes part: what is chosen behind that is chosen by a whole model.
    """
    reached = {linear.matmul: _Reached(linears=1)}
    queue = forward_users(linear.matmul)
    heapify(queue)
    steps = 0
    while queue and steps < _MAX_STEPS:
        # In graph order, so that a node's operands are known before it is.
        node, steps = heappop(queue), steps + 1
        if node in reached or node.op != "call_function":
            continue
        way = _way_to(node, reached)
        if _picks(node) and (way.linears == 1 or _is_among_few(node)):
            return True
        if is_product(node):
            inner = plain_linear(node)
            if inner is None or inner.activation not in reached or way.is_mixed:
                continue
            if way.linears == _MAX_LINEARS:
                continue
            way = replace(way, linears=way.linears + 1)
        reached[node] = way
        for user in forward_users(node):
            heappush(queue, user)
    return False


def _way_to(node: fx.Node, reached: Mapping[fx.Node, _Reached]) -> _Reached:
    ways = [reached[n] for n in node.all_input_nodes if n in reached]
    is_mixed = any(way.is_mixed for way in ways) or _mixes(node, reached)
    return _Reached(max(way.linears for way in ways), is_mixed)


def _mixes(node: fx.Node, reached: Mapping[fx.Node, _Reached]) -> bool:
    """Is it a sum with what is no bias and does not come from the first linear?"""
    if not is_call(node, _SUMS):
        return False
    value = tensor_of(node)
    width = value.shape[-1] if value is not None and value.ndim else None
    others = [n for n in node.all_input_nodes if n not in reached and tensor_of(n) is not None]
    return any(constant_of(n) is None and not is_per_channel(n, width) for n in others)


def _picks(node: fx.Node) -> bool:
    if is_call(node, (aten.max.dim,)):
        # By its indices, which the backward of its values reads, too.
        indices = [n for n in node.users if is_call(n, (operator.getitem,)) and n.args[1] == 1]
        return any(forward_users(n) for n in indices)
    return is_call(node, _PICKS)


def _is_among_few(pick: fx.Node) -> bool:
    value = tensor_of(pick.args[0])  # type: ignore[arg-type]
    choices = value.shape[-1] if value is not None and value.ndim else 1
    return isinstance(choices, int) and choices <= _MAX_EXPERTS
