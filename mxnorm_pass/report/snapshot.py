"""How a graph stood at one time, for what is printed, drawn and estimated of it later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from mxnorm_pass.graph.code import ValueType, op_name, statement, value_type
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import is_backward


@dataclass(slots=True, eq=False)
class NodeState:
    """A node as it stood; the op and the arguments are what a rewrite may change of it.

    Attributes:
        op: as of :func:`op_name`.
        inputs: the nodes that it reads.
        type: of its value.
        module: dotted name of the module that made it, "" outside of any.
        backward: a node of the backward graph.
        code: the statement that computes it; of an input, its type.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    op: str
    inputs: tuple[fx.Node, ...]
    type: ValueType
    module: str
    backward: bool
    code: str

    @classmethod
    def of(cls, node: fx.Node) -> NodeState:
        op, kind = op_name(node), value_type(node.meta.get("val"))
        return cls(
            target=node.target,
            args=node.args,
            kwargs=node.kwargs,
            op=op,
            inputs=tuple(node.all_input_nodes),
            type=kind,
            module=module_path(node),
            backward=is_backward(node),
            code=statement(node, op, kind.name),
        )

    def holds_for(self, node: fx.Node) -> bool:
        """Arguments are immutable: who changes them puts others in their place."""
        return node.args is self.args and node.kwargs is self.kwargs and node.target is self.target


class Snapshot:
    """The nodes of a graph as they stand when this is made, in graph order.

    Args:
        earlier: of the same graph; shares the states of nodes that have not changed since.

    Attributes:
        states: what each node is.
        positions: its place in the graph.
    """

    def __init__(self, graph: fx.Graph, earlier: Snapshot | None = None) -> None:
        known = earlier.states if earlier is not None else {}
        self.states: dict[fx.Node, NodeState] = {}
        for node in graph.nodes:
            state = known.get(node)
            unchanged = state is not None and state.holds_for(node)
            self.states[node] = state if unchanged else NodeState.of(node)  # type: ignore[assignment]
        self.positions = {node: i for i, node in enumerate(self.states)}

    def code(self) -> str:
        """The graph as Python, such as ``add: "f32[2, 16]" = torch.ops.aten.add.Tensor(x, y)``.

        A comment names the module, and the pass (forward or backward), of the lines below it.
        """
        inputs = [node.name for node in self.states if node.op == "placeholder"]
        lines = [f"def forward({', '.join(inputs)}):"]
        module, backward = "", False
        for state in self.states.values():
            is_other = state.module != module or state.backward != backward
            if is_other and state.op not in ("placeholder", "output"):
                module, backward = state.module, state.backward
                origin = f"{module}{' (backward)' if backward else ''}"
                lines.append(f"    # {origin or '-'}")
            lines.append(f"    {state.code}")
        return "\n".join(lines) + "\n"

    @property
    def output(self) -> NodeState:
        return self.states[next(reversed(self.states))]

    def users_of(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """For each of the nodes: those that read it."""
        users: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        for node, state in self.states.items():
            for source in state.inputs:
                if source in users:
                    users[source].append(node)
        return users

    def calls(self) -> Iterable[tuple[fx.Node, NodeState]]:
        """The nodes that call an op."""
        return ((n, state) for n, state in self.states.items() if n.op == "call_function")


class Alignment:
    """Which nodes of two snapshots are the same.

    In two snapshots of one graph a node is itself. Those of a graph that was traced twice are the
    same if they are the n-th call of one op in one module.

    Args:
        before, after: the snapshots.
        one_graph: are they of one graph?
    """

    def __init__(self, before: Snapshot, after: Snapshot, one_graph: bool) -> None:
        if one_graph:
            self._later = {node: node for node in before.states if node in after.states}
        else:
            places = {place: node for node, place in _places(after)}
            pairs = ((node, places.get(place)) for node, place in _places(before))
            self._later = {node: found for node, found in pairs if found is not None}
        self._earlier = {later: earlier for earlier, later in self._later.items()}

    def later(self, node: fx.Node) -> fx.Node | None:
        """What a node of the earlier snapshot is in the later one."""
        return self._later.get(node)

    def earlier(self, node: fx.Node) -> fx.Node | None:
        """What a node of the later snapshot was in the earlier one."""
        return self._earlier.get(node)

    def same(self, before: NodeState, after: NodeState) -> bool:
        """Does a node call the same op on the same nodes in both?"""
        return before is after or (
            before.op == after.op and tuple(map(self.later, before.inputs)) == after.inputs
        )


def _places(snapshot: Snapshot) -> Iterator[tuple[fx.Node, tuple[object, ...]]]:
    counts: Counter[tuple[object, ...]] = Counter()
    for node, state in snapshot.states.items():
        place = (state.module, state.backward, state.op)
        counts[place] += 1
        yield node, (*place, counts[place])
