"""The graphs that Dynamo captured for one compile: the whole, and the bodies of higher-order ops.

What becomes of a body differs, and with it what may be done in it::

    whole     the graph that the backend is given
    inlined   its ops end up among those of the graph around it, such as a checkpointed layer's
    region    one graph for many callers, differentiated by itself (``nested_compile_region``)
    branch    run or not, and run anew in the backward (``torch.cond``, ``while_loop``, ``scan``)

Bodies of other ops, a hook's or an ``autograd.Function``'s among them, are nobody's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

Kind = Literal["whole", "inlined", "region", "branch"]

_KINDS: dict[str, Kind] = {
    "tag_activation_checkpoint": "inlined",
    "wrap_activation_checkpoint": "inlined",
    "wrap": "inlined",
    "invoke_subgraph": "region",
    "cond": "branch",
    "while_loop": "branch",
    "map": "branch",
    "map_impl": "branch",
    "scan": "branch",
}


@dataclass(frozen=True, eq=False)
class Scope:
    """One of the graphs.

    Attributes:
        number: 0 for the whole, then in the order of their calls, parents first.
        gm: the graph, as Dynamo made it.
        nodes: its nodes before anything was changed.
        kind: see the module.
        parent: the scope whose graph calls it, None for the whole.
        callers: the nodes of the parent's graph that call it.
    """

    number: int
    gm: fx.GraphModule
    kind: Kind
    nodes: tuple[fx.Node, ...]
    parent: Scope | None = None
    callers: tuple[fx.Node, ...] = ()

    def within(self, kind: Kind) -> bool:
        """Is it, or is it inside of, a graph of that kind?"""
        return self.kind == kind or (self.parent is not None and self.parent.within(kind))


def scopes_of(gm: fx.GraphModule) -> tuple[Scope, ...]:
    """All scopes of a graph that Dynamo captured; a scope's number is its position."""
    found: list[Scope] = []
    pending: list[Scope] = [Scope(0, gm, "whole", tuple(gm.graph.nodes))]
    while pending:
        scope = pending.pop(0)
        found.append(scope)
        for body, kind, callers in _bodies(scope.gm):
            number = len(found) + len(pending)
            pending.append(Scope(number, body, kind, tuple(body.graph.nodes), scope, callers))
    return tuple(found)


def _bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, Kind, tuple[fx.Node, ...]]]:
    callers: dict[fx.GraphModule, dict[fx.Node, None]] = {}
    for attribute in gm.graph.find_nodes(op="get_attr"):
        body = getattr(gm, str(attribute.target), None)
        if isinstance(body, fx.GraphModule):
            callers.setdefault(body, {}).update(attribute.users)
    for body, users in callers.items():
        kinds = {kind_of_call(user) for user in users}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            yield body, kind, tuple(users)


def kind_of_call(node: fx.Node) -> Kind | None:
    """What the node makes of the graphs that it is given; None for no known higher-order op."""
    if not is_higher_order(node):
        return None
    return _KINDS.get(node.target.name())  # type: ignore[union-attr]


def is_higher_order(node: fx.Node) -> bool:
    """Does the node call an op that takes graphs?"""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def intervened_in(node: fx.Node) -> fx.Node | None:
    """The tensor in whose gradient the node intervenes: it sets a hook, or detaches in place.

    That holds for whoever reads the tensor, not only for those that read it through the node.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if is_higher_order(node):
        name = node.target.name()  # type: ignore[union-attr]
    else:
        name = getattr(node.target, "__name__", node.target)
    # Under compiled autograd Dynamo sets hooks by a function of its own.
    if name not in ("register_hook", "_register_hook_trampoline", "detach_"):
        return None
    return node.args[0]  # type: ignore[return-value]
