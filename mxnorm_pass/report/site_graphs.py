"""Cut out of the graph what belongs to each site, before and after the rewrite.

Before, a fused site is the norm, the casts and the linears that it feeds, and the norm's backward;
after, what is left of these and what the rewrite has put there. A skipped one is its norm. Around
it stand the nodes that it reads and that read it. Only the nodes of sites are visited, so that the
time is linear in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import fx

from mxnorm_pass.report.site import Site
from mxnorm_pass.report.snapshot import Alignment, NodeState
from mxnorm_pass.report.subgraph import Change, Subgraph, SubgraphNode, Traffic
from mxnorm_pass.report.traffic import TrafficEstimate

Users = Mapping[fx.Node, Sequence[fx.Node]]
Parts = Mapping[fx.Node, str]


@dataclass(frozen=True)
class _Cut:
    """What stands at and around a site at one time.

    Attributes:
        parts: what each node belongs to, in graph order, the nodes around the site included.
    """

    estimate: TrafficEstimate
    parts: Mapping[fx.Node, str]
    traffic: Traffic

    @classmethod
    def of(cls, own: Mapping[fx.Node, str], users: Users, estimate: TrafficEstimate) -> _Cut:
        """The nodes of a site with their parts, and those that they read and that read them."""
        snapshot = estimate.snapshot
        parts = dict(own)
        read_outside = []
        for node in own:
            outside = [user for user in users[node] if user not in own]
            if outside:
                read_outside.append(node)
            parts |= dict.fromkeys(outside, "reader")
        for node in own:
            sources = snapshot.states[node].inputs
            parts |= dict.fromkeys((n for n in sources if n not in own), "input")
        nodes = sorted(parts, key=snapshot.positions.__getitem__)
        traffic = estimate.of([node for node in nodes if node in own], read_outside)
        return cls(estimate, {node: parts[node] for node in nodes}, traffic)

    def state(self, node: fx.Node) -> NodeState | None:
        return self.estimate.snapshot.states[node] if node in self.parts else None

    def subgraph(self, change: Callable[[fx.Node, NodeState], Change]) -> Subgraph:
        states = self.estimate.snapshot.states
        nodes = (self._node(n, states[n], change(n, states[n])) for n in self.parts)
        return Subgraph(tuple(nodes), self.traffic)

    def _node(self, node: fx.Node, state: NodeState, change: Change) -> SubgraphNode:
        return SubgraphNode(
            name=node.name,
            op=state.op,
            # The graph's output reads far more than the site.
            inputs=tuple([n.name for n in state.inputs if n in self.parts]),
            type=state.type.name,
            module=state.module,
            part=self.parts[node],
            change=change,
            backward=state.backward,
            bytes=self.estimate.of_op(node),
        )


class SiteGraphs:
    """Draws the sites of a graph as it stood before and after the pass.

    Args:
        parts: per site what belongs to it before the rewrite, and as what ("norm", "cast").
    """

    def __init__(self, parts: Iterable[Parts]) -> None:
        self._before = [dict(of_site) for of_site in parts]
        self._after = [dict(of_site) for of_site in self._before]

    def became(self, index: int, parts: Parts) -> None:
        """Say what a site is in the graph that was traced anew with estimates in it."""
        self._after[index] = dict(parts)

    def add(self, index: int, created: Parts) -> None:
        """Say which nodes the rewrite of a site has put into the graph."""
        self._after[index] |= created

    def drawn(
        self,
        sites: Sequence[Site],
        before: TrafficEstimate,
        after: TrafficEstimate,
        alignment: Alignment,
    ) -> tuple[Site, ...]:
        """The sites with both subgraphs; a skipped one has only the first."""
        cuts = _cuts(self._before, before), _cuts(self._after, after)
        triples = zip(sites, *cuts, strict=True)
        return tuple(_drawn(site, cut, new_cut, alignment) for site, cut, new_cut in triples)


def _cuts(sites: Sequence[Mapping[fx.Node, str]], estimate: TrafficEstimate) -> list[_Cut]:
    """One per site, of the nodes that stand in the estimated graph."""
    states = estimate.snapshot.states
    own = [{n: part for n, part in parts.items() if n in states} for parts in sites]
    users = estimate.snapshot.users_of(chain.from_iterable(own))
    return [_Cut.of(parts, users, estimate) for parts in own]


def _drawn(site: Site, cut: _Cut, new_cut: _Cut, alignment: Alignment) -> Site:
    if site.status == "skipped":
        return replace(site, before=cut.subgraph(lambda node, state: ""))

    def change_before(node: fx.Node, state: NodeState) -> Change:
        later = alignment.later(node)
        if later is None:
            return "removed"
        other = new_cut.state(later)
        return "" if other is None or alignment.same(state, other) else "rewired"

    def change_after(node: fx.Node, state: NodeState) -> Change:
        earlier = alignment.earlier(node)
        if earlier is None:
            return "added"
        reads_new = any(alignment.earlier(source) is None for source in state.inputs)
        other = cut.state(earlier)
        same = other is None or alignment.same(other, state)
        return "" if same and not reads_new else "rewired"

    return replace(site, before=cut.subgraph(change_before), after=new_cut.subgraph(change_after))
