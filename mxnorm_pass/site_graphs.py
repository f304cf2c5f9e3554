"""Cut out of the graph what belongs to each site, before and after the rewrite.

Before, a fused site is the norm, the casts and the linears that it feeds, and the norm's backward;
after, what is left of these and what the rewrite has put there. A skipped one is its norm. Around
it stand the nodes that it reads and that read it. Only the nodes of sites are visited, so that the
time is linear in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph_code import op_name, type_name
from mxnorm_pass.graph_utils import forward_users, is_backward
from mxnorm_pass.match import Fusion, Refusal
from mxnorm_pass.match.linear import CastIndex, is_matmul, readers
from mxnorm_pass.match.norm import Norm
from mxnorm_pass.module_names import module_path
from mxnorm_pass.report import Site
from mxnorm_pass.subgraph import Change, Subgraph, SubgraphNode, Traffic
from mxnorm_pass.traffic import TrafficEstimate, is_free

_FUSED_OPS = frozenset(
    {ops.norm_cast, ops.norm_cast_both, ops.add_norm_cast, ops.add_norm_cast_both}
)
# A weight is some views, a cast and its dequantisation away from the matmul.
_MAX_WEIGHT_NODES = 64
_MAX_MODULE_NODES = 64


Inputs = Callable[[fx.Node], Sequence[fx.Node]]


@dataclass(frozen=True)
class _Node:
    """A node as it stood: a rewrite changes its op and its inputs."""

    node: fx.Node
    part: str
    op: str
    inputs: tuple[fx.Node, ...]
    bytes: int | None

    def is_same(self, other: _Node | None) -> bool:
        return other is None or (self.op == other.op and self.inputs == other.inputs)

    def public(self, change: Change, shown: Container[fx.Node]) -> SubgraphNode:
        return SubgraphNode(
            name=self.node.name,
            op=self.op,
            # The graph's output reads far more than the site.
            inputs=tuple(n.name for n in self.inputs if n in shown),
            type=type_name(self.node),
            module=module_path(self.node),
            part=self.part,
            change=change,
            backward=is_backward(self.node),
            bytes=self.bytes,
        )


@dataclass(frozen=True)
class _Cut:
    """What stood at and around a site."""

    nodes: Mapping[fx.Node, _Node]
    traffic: Traffic


@dataclass(frozen=True)
class _Draft:
    """A site between its two cuts; ``parts`` also takes what the rewrite creates."""

    found: Fusion | Refusal
    parts: dict[fx.Node, str]
    before: _Cut


@dataclass
class SiteGraphs:
    """Draws the sites of a graph while the pass works on it.

    Made before anything is changed; then :meth:`match` once the sites are known,
    :meth:`rewriting` around each rewrite, :meth:`sites` in the end.
    """

    graph: fx.Graph
    estimate: TrafficEstimate = field(init=False)
    _original: frozenset[fx.Node] = field(init=False)
    _matmul_inputs: dict[fx.Node, list[fx.Node]] = field(init=False)
    _drafts: list[_Draft] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.estimate = TrafficEstimate(self.graph)
        self._original = frozenset(self.graph.nodes)
        matmuls = filter(is_matmul, self.graph.nodes)
        self._matmul_inputs = {matmul: matmul.all_input_nodes for matmul in matmuls}

    def match(self, found: Sequence[Fusion | Refusal], norms: Iterable[Norm]) -> None:
        """Cut the sites out of the graph that came in, seeing through inserted casts."""
        by_anchor = {norm.anchor: norm for norm in norms}
        for site in found:
            if isinstance(site, Fusion):
                parts = dict(_parts_of_fusion(site, self._original_inputs))
            else:
                parts = dict(_parts_of_refusal(site, by_anchor.get(site.anchor)))
            own = {node: part for node, part in parts.items() if node in self._original}
            cut = self._cut(own, self._original_inputs, self._original_users)
            self._drafts.append(_Draft(site, parts, cut))

    @contextmanager
    def rewriting(self, fusion: Fusion) -> Iterator[None]:
        """Note the nodes that are created meanwhile as parts of the fusion."""
        draft = next(draft for draft in self._drafts if draft.found is fusion)
        create_node = self.graph.create_node

        def create_and_note(*args: Any, **kwargs: Any) -> fx.Node:
            node = create_node(*args, **kwargs)
            draft.parts[node] = ""
            return node

        vars(self.graph)["create_node"] = create_and_note
        try:
            yield
        finally:
            del vars(self.graph)["create_node"]

    def sites(self) -> tuple[Site, ...]:
        """The sites with both cuts; a skipped one has only the first."""
        self.estimate = TrafficEstimate(self.graph, self.estimate.sizes)
        alive = frozenset(self.graph.nodes)
        return tuple(self._site(draft, alive) for draft in self._drafts)

    def _site(self, draft: _Draft, alive: frozenset[fx.Node]) -> Site:
        site, before = draft.found.site(), draft.before
        if isinstance(draft.found, Refusal):
            return replace(site, before=_public(before, lambda node: ""))
        own = {
            node: part or _part_of_created(node, draft.found)
            for node, part in draft.parts.items()
            if node in alive
        }
        after = self._cut(own, lambda n: n.all_input_nodes, lambda n: n.users)

        def change_before(node: _Node) -> Change:
            if node.node not in alive:
                return "removed"
            return "" if node.is_same(after.nodes.get(node.node)) else "rewired"

        def change_after(node: _Node) -> Change:
            if node.node not in self._original:
                return "added"
            reads_new = any(source not in self._original for source in node.inputs)
            same = node.is_same(before.nodes.get(node.node)) and not reads_new
            return "" if same else "rewired"

        return replace(
            site, before=_public(before, change_before), after=_public(after, change_after)
        )

    def _cut(
        self,
        parts: Mapping[fx.Node, str],
        inputs: Inputs,
        users: Callable[[fx.Node], Iterable[fx.Node]],
    ) -> _Cut:
        context: dict[fx.Node, str] = {}
        read_outside = []
        for node in parts:
            outside = [user for user in users(node) if user not in parts]
            if outside:
                read_outside.append(node)
            context |= dict.fromkeys(outside, "reader")
        for node in parts:
            context |= dict.fromkeys((n for n in inputs(node) if n not in parts), "input")
        nodes = {}
        for node in sorted({**parts, **context}):
            part = parts.get(node) or context[node]
            moved = self.estimate.of_op(node)
            nodes[node] = _Node(node, part, op_name(node), tuple(inputs(node)), moved)
        own = [node for node in nodes if node in parts]
        return _Cut(nodes, self.estimate.of(own, read_outside))

    def _original_inputs(self, node: fx.Node) -> Sequence[fx.Node]:
        """What the node read when it came in: inserted casts stand in front of matmuls."""
        return self._matmul_inputs.get(node) or node.all_input_nodes

    def _original_users(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if user in self._original:
                yield user
            else:
                yield from self._original_users(user)


def _public(cut: _Cut, change: Callable[[_Node], Change]) -> Subgraph:
    nodes = (node.public(change(node), cut.nodes) for node in cut.nodes.values())
    return Subgraph(tuple(nodes), cut.traffic)


def _parts_of_fusion(fusion: Fusion, inputs: Inputs) -> Iterator[tuple[fx.Node, str]]:
    """The nodes of the site with the part that each belongs to; what comes last holds."""
    if fusion.backward is not None:
        yield from _as("norm backward", fusion.backward.nodes)
    for transposed in fusion.transposed:
        yield from _as("cast along T", transposed.cast.nodes)
    activations = {n for c in fusion.consumers for n in (*c.nodes, *c.cast.nodes)}
    for consumer in fusion.consumers:
        weight = "weight" if consumer.weight is None else "weight cast"
        yield from _as(weight, _weight_nodes(consumer.linear.matmul, activations, inputs))
        yield from _as("dequantize", consumer.linear.slice)
        yield from _as("cast", (*consumer.reader.path, *consumer.cast.nodes))
    yield from _as("linear", (consumer.linear.matmul for consumer in fusion.consumers))
    yield from _as("norm", fusion.norm.nodes)
    if fusion.residual is not None:
        yield fusion.residual, "residual add"


def _parts_of_refusal(refusal: Refusal, norm: Norm | None) -> Iterator[tuple[fx.Node, str]]:
    """The norm, and the views and dtype casts on the way to its readers."""
    if norm is None:
        yield from _as("norm", _same_module(refusal.anchor))
        return
    for reader in readers(norm.output, CastIndex.of(())):
        yield from _as("norm", reader.path)
    yield from _as("norm", norm.nodes)


def _as(part: str, nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    return ((node, part) for node in nodes)


def _part_of_created(node: fx.Node, fusion: Fusion) -> str:
    if is_backward(node):
        return "norm backward"
    while is_free(node):
        node = node.all_input_nodes[0]
    if node.target in _FUSED_OPS:
        return "norm and cast"
    if node.target is ops.dequantize:
        return "dequantize"
    return "norm" if module_path(node) == fusion.norm.name else "weight cast"


def _weight_nodes(matmul: fx.Node, stop: Container[fx.Node], inputs: Inputs) -> set[fx.Node]:
    """What is computed for the other operand of a linear, back to the inputs of the graph."""
    found: set[fx.Node] = set()
    pending = [*inputs(matmul), *matmul.all_input_nodes]
    while pending and len(found) < _MAX_WEIGHT_NODES:
        node = pending.pop()
        if node.op == "call_function" and node not in stop and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _same_module(anchor: fx.Node) -> set[fx.Node]:
    """The forward nodes around ``anchor`` that its module made, at most a few."""
    module = module_path(anchor)
    found = {anchor}
    pending = [anchor] if module else []
    while pending and len(found) < _MAX_MODULE_NODES:
        node = pending.pop()
        for other in (*node.all_input_nodes, *forward_users(node)):
            if other not in found and other.op == "call_function" and module_path(other) == module:
                found.add(other)
                pending.append(other)
    return found
