"""The part of a graph that a site is about, as data: what a page or a notebook draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Nodes around a site that are no part of it: what it reads, and who reads it.
CONTEXT = frozenset({"input", "reader"})

Change = Literal["", "removed", "added", "rewired"]


@dataclass(frozen=True)
class Traffic:
    """Estimated bytes to and from device memory; see ``traffic`` for how they are estimated.

    Attributes:
        unfused: every op is a kernel of its own that reads its inputs and writes its outputs once.
        fused: all pointwise ops and reductions between two library calls (matmul, attention) are
            one kernel.
    Either is None where a size is symbolic and has no hint.
    """

    unfused: int | None
    fused: int | None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Traffic:
        return cls(**entry)


@dataclass(frozen=True)
class SubgraphNode:
    """One node of a graph.

    Attributes:
        name: as in ``Graph.before`` or ``Graph.after``, where the node's code is.
        op: "aten.mm.default"; "placeholder" for an input of the graph.
        inputs: names of the nodes of the subgraph that it reads.
        type: dtype and shape, "bf16[2, 16, 64]"; "" where the value is no single tensor.
        module: dotted name of the module that made it, "" outside of any.
        part: what it belongs to, such as "norm", "cast" or "linear"; "input" and "reader" are
            around the site.
        change: what the pass did to it; "rewired" nodes read something else than before.
        backward: a node of the backward graph.
        bytes: what the op moves as a kernel of its own; 0 for views, None where unknown.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    type: str = ""
    module: str = ""
    part: str = ""
    change: Change = ""
    backward: bool = False
    bytes: int | None = None


@dataclass(frozen=True)
class Subgraph:
    """The nodes of one site in graph order, those around it included."""

    nodes: tuple[SubgraphNode, ...]
    traffic: Traffic

    @property
    def ops(self) -> int:
        """How many calls of the site move bytes; views and the nodes around it do not count."""
        return sum(node.part not in CONTEXT and node.bytes != 0 for node in self.nodes)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Subgraph:
        """Read back what :func:`json_value` and JSON have made of one."""
        nodes = (
            SubgraphNode(**{**node, "inputs": tuple(node["inputs"])}) for node in entry["nodes"]
        )
        return cls(tuple(nodes), Traffic.from_dict(entry["traffic"]))
