"""Tell a mixture-of-experts router from other linears: its output picks experts by top-k."""

from __future__ import annotations

from torch import fx

from mxnorm_pass.graph_utils import aten, forward_users
from mxnorm_pass.match.linear import PlainLinear
from mxnorm_pass.match.matmul import is_matmul

_PICKS = frozenset({aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default})
# Routers are a handful of ops away from their top-k: softmax or sigmoid, a bias, groups.
_MAX_STEPS = 64


def is_router(linear: PlainLinear) -> bool:
    """Do the linear's logits reach a top-k before any other matmul?

    Which experts a token visits is a discrete choice that low precision flips; routers are kept in
    high precision throughout the field.
    """
    pending = [linear.matmul]
    seen: set[fx.Node] = set()
    while pending and len(seen) < _MAX_STEPS:
        node = pending.pop(0)
        for user in forward_users(node):
            if user.target in _PICKS:
                return True
            if user not in seen and user.op == "call_function" and not is_matmul(user):
                seen.add(user)
                pending.append(user)
    return False
