"""Put nodes into a graph: calls with fake values and an origin, constants."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx

from mxnorm_pass.graph.fake import fake_mode, real_tensors, run_fake
from mxnorm_pass.graph.nodes import BACKWARD, aten

_ORIGIN_KEYS = (
    BACKWARD,
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "source_fn_stack",
    "from_node",
    "partitioner_tag",
    "recompute",
    "ac_graph_id",
    "custom",
    "autograd_backward",
)


def copy_origin(source: fx.Node, target: fx.Node) -> None:
    """Say of ``target`` that it comes from where ``source`` comes from."""
    for key in _ORIGIN_KEYS:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Add a call at the graph's insertion point, with a fake value and ``like``'s origin."""
    node = graph.call_function(target, args)
    copy_origin(like, node)
    run_fake(node, fake_mode(like))
    return node


@contextmanager
def created_nodes(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """A list that fills with the nodes that are added to the graph meanwhile."""
    owner = owner_of(graph)
    created: list[fx.Node] = []
    hook = created.append
    owner._register_create_node_hook(hook)
    try:
        yield created
    finally:
        owner._unregister_create_node_hook(hook)


def owner_of(graph: fx.Graph) -> fx.GraphModule:
    """The module whose graph it is."""
    owner = graph.owning_module
    assert owner is not None, "the graph belongs to no module"
    return owner


def outputs_of(graph: fx.Graph, like: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    """One getitem node per output of a multi-output call."""
    return tuple(call(graph, like, operator.getitem, node, i) for i in range(len(node.meta["val"])))


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """A copy in a module of its own, which shares what the nodes' ``meta`` holds."""
    return fx.GraphModule(owner_of(graph), copy.deepcopy(graph)).graph


CONSTANT_PREFIX = "_mxnorm_constant_"


def constant(graph: fx.Graph, like: fx.Node, value: Tensor) -> fx.Node:
    """Add a tensor that is a constant of the graph, on the device of the node ``like``.

    It is a buffer of the module that owns the graph, named by its content: equal graphs get
    equal cache keys, and no two values share a name. Nodes read it through a ``lift_fresh_copy``,
    as in graphs that torch traces: fake tensor modes take real tensors nowhere else. What
    compiles or exports the graph calls :func:`unwrap_constants`.
    """
    device = like.meta["val"].device
    owner = owner_of(graph)
    with real_tensors():
        content = value.cpu().contiguous().numpy().tobytes()
        signature = repr((value.dtype, tuple(value.shape), device)).encode()
        name = f"{CONSTANT_PREFIX}{hashlib.sha256(signature + content).hexdigest()[:16]}"
        if not hasattr(owner, name):
            owner.register_buffer(name, value.to(device))
    node = graph.get_attr(name)
    copy_origin(like, node)
    node.meta["val"] = fake_mode(like).from_tensor(getattr(owner, name), static_shapes=True)
    return call(graph, like, aten.lift_fresh_copy.default, node)


def unwrap_constants(graph: fx.Graph) -> None:
    """Let all read a constant itself and not a copy of it."""
    for node in graph.find_nodes(op="call_function", target=aten.lift_fresh_copy.default):
        source = node.args[0]
        if source.op == "get_attr" and str(source.target).startswith(CONSTANT_PREFIX):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
