"""Snapshots of graphs, and what the pass does to the process meanwhile."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import fx, nn

from mxnorm_pass.graph.build import created_nodes
from mxnorm_pass.passes.garbage_collection import collector_paused
from mxnorm_pass.report.snapshot import Snapshot


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.neg(torch.abs(x)))


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def test_a_snapshot_stays_as_the_graph_was() -> None:
    module = fx.symbolic_trace(Chain())
    absolute, negative, relu = calls(module.graph)
    before = Snapshot(module.graph)
    code = before.code()
    relu.replace_input_with(negative, absolute)
    module.graph.erase_node(negative)
    after = Snapshot(module.graph, before)
    assert before.code() == code and "neg" in code
    assert before.states[relu].inputs == (negative,) and after.states[relu].inputs == (absolute,)
    assert after.code() == Snapshot(module.graph).code() != code
    assert before.users_of([absolute]) == {absolute: [negative]}
    assert after.users_of([absolute]) == {absolute: [relu]}


def test_snapshots_share_the_nodes_that_did_not_change() -> None:
    module = fx.symbolic_trace(Chain())
    absolute, negative, relu = calls(module.graph)
    before = Snapshot(module.graph)
    negative.target = torch.sin
    after = Snapshot(module.graph, before)
    shared = {node for node in before.states if before.states[node] is after.states[node]}
    assert shared == set(module.graph.nodes) - {negative}
    assert after.states[negative].op == "sin"


def test_created_nodes_are_those_of_the_block() -> None:
    module = fx.symbolic_trace(Chain())
    graph = module.graph
    first, *_ = calls(graph)
    with graph.inserting_after(first), created_nodes(graph) as created:
        inside = [
            graph.call_function(torch.sin, (first,)),
            graph.call_function(torch.cos, (first,)),
        ]
    with graph.inserting_after(first):
        graph.call_function(torch.exp, (first,))
    assert created == inside


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError), collector_paused():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
