"""Selective checkpointing of marked linears: policies decide on the ops that they know.

A policy is asked op by op what to save, while autograd runs; a marked linear is one op then, and
the matmul that most policies save comes to be only later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import aten

# Where Dynamo keeps what makes the contexts of a checkpoint.
_CONTEXT_FN = "_checkpoint_context_fn"


def ask_about_matmuls(body: fx.GraphModule) -> None:
    """Have the policy of a checkpointed body, if it has one, asked about marked linears' matmuls.

    Of ``body`` only its meta is changed.
    """
    context_fn = body.meta.get(_CONTEXT_FN)
    if context_fn is not None:
        body.meta[_CONTEXT_FN] = partial(_contexts, context_fn)


def _contexts(context_fn: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    forward, recomputed = context_fn()
    policy = getattr(forward, "policy_fn", None)
    if policy is not None:
        forward.policy_fn = partial(_ask, policy)
    return forward, recomputed


def _ask(policy: Callable[..., Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    if op is ops.linear:
        # The views are for the policy alone, not for the graph.
        with disable_proxy_modes_tracing():
            op, args = _matmul(*args)
    return policy(context, op, *args, **kwargs)


def _matmul(x: Any, weight: Any, bias: Any, *_: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a marked linear is opened into."""
    operands = (x.reshape(-1, weight.shape[1]) if x.ndim != 2 else x, weight.t())
    if bias is None:
        return aten.mm.default, operands
    return aten.addmm.default, (bias, *operands)
