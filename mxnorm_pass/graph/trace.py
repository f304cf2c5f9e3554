"""Trace a function once per signature and graft its nodes into graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mxnorm_pass.graph.build import copy_origin
from mxnorm_pass.graph.fake import fake_mode, run_fake, signature, tensors
from mxnorm_pass.graph.nodes import aten


class FunctionTracer:
    """Traces functions to ATen once per signature and grafts the copies into a graph.

    Args:
        decompositions: for ``make_fx``; empty keeps the ops that the function calls.
    """

    def __init__(self, decompositions: Mapping[Any, Any] | None = None) -> None:
        self._decompositions = dict(decompositions or {})
        self._traced: dict[Any, fx.GraphModule] = {}

    def graft(
        self,
        graph: fx.Graph,
        before: fx.Node,
        function: Callable[..., Any],
        args: Sequence[Any],
        origin: fx.Node | None = None,
    ) -> Any:
        """Copy ``function(*args)`` in before a node and return its output node(s).

        Args:
            args: nodes, lists of them, and constants that are passed through.
            origin: the node from which the copies say they come; None: ``before``.
        """
        like = origin or before
        traced = self._trace(function, args, like)
        inputs = iter(_nodes(args))
        env: dict[fx.Node, fx.Node] = {}
        mode = fake_mode(like, *_nodes(args))
        with graph.inserting_before(before):
            for node in traced.graph.nodes:
                if node.op == "placeholder":
                    env[node] = next(inputs)
                elif node.op == "output":
                    return fx.map_arg(node.args[0], lambda n: env[n])
                elif node.op == "get_attr":
                    env[node] = _inline_constant(graph, like, getattr(traced, node.target), mode)
                else:
                    copy = graph.node_copy(node, lambda n: env[n])
                    copy.meta = {}
                    copy_origin(like, copy)
                    run_fake(copy, mode)
                    env[node] = copy
        raise AssertionError("a traced graph ends in an output node")

    def _trace(
        self, function: Callable[..., Any], args: Sequence[Any], like: fx.Node
    ) -> fx.GraphModule:
        key = (function, signature(args))
        if key not in self._traced:
            nodes = _nodes(args)

            def on_tensors(*tensors: Tensor) -> Any:
                it = iter(tensors)
                return function(*pytree.tree_map_only(fx.Node, lambda _: next(it), list(args)))

            values = [n.meta["val"] for n in nodes]
            # Some ops take symbolic sizes in their Python implementation only.
            with fake_mode(like, *nodes), _undisturbed(values), enable_python_dispatcher():
                traced = make_fx(on_tensors, decomposition_table=self._decompositions)(*values)
            _drop_detaches(traced.graph)
            traced.graph.eliminate_dead_code()
            self._traced[key] = traced
        return self._traced[key]


def _nodes(args: Sequence[Any]) -> list[fx.Node]:
    """Those among the arguments and in lists of these, in order."""
    return [leaf for leaf in pytree.tree_leaves(list(args)) if isinstance(leaf, fx.Node)]


@contextmanager
def _undisturbed(values: Iterable[Any]) -> Iterator[None]:
    """Keep the modes in which the user compiles out of a trace.

    Autocast adds casts; anomaly mode asks for the values of gradients.
    """
    devices = {tensor.device.type for value in values for tensor in tensors(value)}
    with without_autocast(devices), torch.autograd.set_detect_anomaly(False):
        yield


def without_autocast(devices: Iterable[str]) -> ExitStack:
    """A context without autocast for these types of devices."""
    stack = ExitStack()
    for device in devices:
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _drop_detaches(graph: fx.Graph) -> None:
    """Autograd has left its mark on the trace; in a functional graph it means nothing."""
    for node in graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])


def _inline_constant(graph: fx.Graph, like: fx.Node, value: Any, mode: Any) -> fx.Node:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise AssertionError(f"a traced function holds a constant that is no scalar: {value}")
    node = graph.call_function(
        aten.full.default,
        (list(value.shape), value.item()),
        {"dtype": value.dtype, "device": value.device, "pin_memory": False},
    )
    copy_origin(like, node)
    run_fake(node, mode)
    return node
