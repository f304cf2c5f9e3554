"""Which node of Dynamo's graph each node of a traced graph comes from.

A copy of Dynamo's graph with a ``mark`` behind each node is traced; the marks, which read what the
node has made, then stand in the traced graph where they stood in Dynamo's::

    y = torch.rms_norm(x, ...)                pow_1 = aten.pow(x, 2)
    mark([y], scope 0, position 3)      =>    ...
    z = torch.nn.functional.linear(y, w)      mul_1 = aten.mul(mul, w)
    mark([z], scope 0, position 4)            mark([mul_1], 0, 3)
                                              ...

So the value of each of Dynamo's nodes is known as a node of the traced graph, and the nodes between
two marks as what one of Dynamo's nodes computes. A last mark says where a graph's forward ends.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mxnorm_pass import ops
from mxnorm_pass.graph.cleanup import remove_dead
from mxnorm_pass.graph.nodes import BACKWARD, partition_of
from mxnorm_pass.passes.before_autograd.scopes import Scope, intervened_in, kind_of_call

_END = -1


@dataclass(frozen=True)
class Origin:
    """One of Dynamo's nodes, and the scope whose graph it is in."""

    scope: Scope
    node: fx.Node

    @property
    def caller(self) -> Origin | None:
        """The node that calls the scope; None for the whole, or where several nodes do."""
        scope = self.scope
        if scope.parent is None or len(scope.callers) != 1:
            return None
        return Origin(scope.parent, scope.callers[0])

    def seen_from(self, scope: Scope) -> Origin | None:
        """The node of ``scope``'s graph that this one is, or is called by, if there is one."""
        origin: Origin | None = self
        while origin is not None and origin.scope is not scope:
            origin = origin.caller
        return origin


@dataclass(frozen=True, eq=False)
class Provenance:
    """What the marks of one traced graph say.

    Attributes:
        scope: the scope that the graph was traced from; those inlined in it have marks, too.
        values: the traced node that holds the value of one of Dynamo's nodes.
        origins: of the forward's traced nodes.
        behind: the nodes behind the last mark, which no forward reads.
        interventions: Dynamo's nodes that intervene in the gradient of a traced node's value.
    """

    scope: Scope
    values: Mapping[fx.Node, fx.Node]
    origins: Mapping[fx.Node, Origin]
    behind: frozenset[fx.Node]
    interventions: Mapping[fx.Node, tuple[fx.Node, ...]]
    _readers: Mapping[fx.Node, tuple[fx.Node, ...]]

    def readers_of(self, traced: fx.Node) -> tuple[fx.Node, ...]:
        """The forward nodes that read a traced node, before anything was changed."""
        return self._readers.get(traced, ())

    def computed_by(self, node: fx.Node) -> list[fx.Node]:
        """The traced nodes that one of Dynamo's nodes computes, with those of its bodies."""
        return self._computed.get(node, [])

    @cached_property
    def _computed(self) -> dict[fx.Node, list[fx.Node]]:
        found: dict[fx.Node, list[fx.Node]] = {}
        for traced, origin in self.origins.items():
            at: Origin | None = origin
            while at is not None:
                found.setdefault(at.node, []).append(traced)
                at = at.caller
        return found


def mark_ends(scopes: Sequence[Scope]) -> None:
    """Put the last mark into each scope's graph, in place."""
    for scope in scopes:
        _insert(scope.gm.graph, scope.gm.graph.output_node(), [], scope.number, _END)
        scope.gm.recompile()


def marked_copy(scopes: Sequence[Scope]) -> fx.GraphModule:
    """A copy of the whole with a mark behind every node of every scope."""
    copies: dict[fx.GraphModule, fx.GraphModule] = {}
    for scope in reversed(scopes):
        copies[scope.gm] = _marked(scope, copies)
    return copies[scopes[0].gm]


def _marked(scope: Scope, copies: Mapping[fx.GraphModule, fx.GraphModule]) -> fx.GraphModule:
    original = scope.gm
    marked = copied_graph_module(original)
    for name, child in original._modules.items():
        if isinstance(child, fx.GraphModule) and child in copies:
            setattr(marked, name, copies[child])
    graph = marked.graph
    nodes = list(graph.nodes)
    first = next(n for n in nodes if n.op != "placeholder")
    for position, node in enumerate(nodes):
        if node.op == "output":
            _insert(graph, node, [], scope.number, _END)
        elif node.op != "get_attr":
            before = first if node.op == "placeholder" else node.next
            _insert(graph, before, _marked_values(node), scope.number, position)
        if kind_of_call(node) == "region":
            # Traced regions are cached by the name that the call gives them.
            body, name, *operands = node.args
            node.args = (body, f"{name}_marked", *operands)
    marked.recompile()
    return marked


def copied_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """With what AOTAutograd reads of Dynamo's graph beside its nodes to guard on its inputs."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta.update(gm.meta)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        copied._param_name_to_source = dict(sources)  # type: ignore[assignment]
    placeholders = copied.graph.find_nodes(op="placeholder")
    for node, original in zip(placeholders, gm.graph.find_nodes(op="placeholder"), strict=True):
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return copied


def copied_with_bodies(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares no graph with ``gm``, nor any body of a higher-order op in it."""
    copied = copied_graph_module(gm)
    for name, child in gm._modules.items():
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, copied_with_bodies(child))
    return copied


def _insert(graph: fx.Graph, before: fx.Node, values: list[fx.Node], *place: int) -> None:
    with graph.inserting_before(before):
        graph.call_function(ops.mark, (values, *place))


def _marked_values(node: fx.Node) -> list[fx.Node]:
    value = example_value(node)
    plain = value is not None and not is_traceable_wrapper_subclass(value)
    return [node] if plain and value.layout == torch.strided else []  # type: ignore[union-attr]


def example_value(node: fx.Node) -> Tensor | None:
    """The fake tensor that stands for a node of Dynamo's graph, None if it is no tensor."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def has_marks(graph: fx.Graph) -> bool:
    return bool(graph.find_nodes(op="call_function", target=ops.mark, sort=False))


@dataclass
class _Reading:
    """Marks met so far, in the order of the traced graph."""

    scopes: Sequence[Scope]
    scope: Scope | None = None
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    origins: dict[fx.Node, Origin] = field(default_factory=dict)
    repeated: set[fx.Node] = field(default_factory=set)
    unclaimed: list[fx.Node] = field(default_factory=list)

    def mark(self, mark: fx.Node) -> None:
        values, number, position = mark.args
        scope = self.scopes[number]  # type: ignore[index]
        if position == _END:
            self.scope, self.unclaimed = scope, []
            return
        origin = Origin(scope, scope.nodes[position])  # type: ignore[index]
        self.origins |= dict.fromkeys(self.unclaimed, origin)
        self.unclaimed = []
        for value in values:  # type: ignore[union-attr]
            if origin.node in self.values:
                self.repeated.add(origin.node)
            self.values[origin.node] = value  # type: ignore[assignment]


def take_marks(graph: fx.Graph, scopes: Sequence[Scope]) -> Provenance | None:
    """Remove the marks of a traced graph and say what they said; None where it has none."""
    reading = _Reading(scopes)
    for node in list(graph.nodes):
        if node.target is ops.mark:
            reading.mark(node)
            graph.erase_node(node)
        elif node.op in ("call_function", "get_attr"):
            reading.unclaimed.append(node)
    if reading.scope is None:
        return None
    if reading.values:
        # Some nodes were there for their marks alone.
        remove_dead(graph)
    for node in reading.repeated:
        # A body that was inlined twice: no one value.
        del reading.values[node]
    alive = set(graph.nodes)
    origins = {node: origin for node, origin in reading.origins.items() if node in alive}
    readers = {n: tuple(user for user in n.users if user in origins) for n in graph.nodes}
    return Provenance(
        scope=reading.scope,
        values=reading.values,
        origins=origins,
        behind=frozenset(reading.unclaimed),
        interventions=_interventions(scopes, reading.values),
        _readers=readers,
    )


def _interventions(
    scopes: Sequence[Scope], values: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in (node for scope in scopes for node in scope.nodes):
        tensor = intervened_in(node)
        if tensor is not None and tensor in values:
            on = values[tensor]
            found[on] = (*found.get(on, ()), node)
    return found


def note_backward(graph: fx.Graph, provenance: Provenance) -> None:
    """Note the backward nodes of a body that is differentiated by itself.

    AOTAutograd does so in the graph of the whole; in a body only the last mark tells.
    """
    if not any(partition_of(node)[0] for node in graph.nodes):
        for node in provenance.behind:
            node.meta[BACKWARD] = True
