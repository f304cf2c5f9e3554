"""``Report.diff``: what changed between two configurations or two versions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matching import Model, expected_warnings, inputs

import mxnorm_pass
from mxnorm_pass import Graph, NearMiss, Report, ReportDiff, Site, SkipReason
from mxnorm_pass.report.diff import GraphDiff, SiteKey

pytestmark = expected_warnings
FUSED = Site("a", ("q", "k"), "fused", estimator="mxnorm", gain="fold", format="mxfp8")
SKIPPED = Site("b", reason=SkipReason.WIDTH, near_miss=NearMiss("mul", "32", "48", "x.py:1"))


def graph(*sites: Site, name: str = "inference", **counts: Any) -> Graph:
    return Graph(name, "before", "after", sites=sites, **counts)


def report(*graphs: Graph) -> Report:
    made = Report()
    for each in graphs:
        made.add(each)
    return made


def only_graph(diff: ReportDiff) -> GraphDiff:
    (changed,) = diff.graphs
    return changed


def test_equal_reports_differ_in_nothing() -> None:
    diff = report(graph(FUSED, SKIPPED)).diff(report(graph(FUSED, SKIPPED)))
    assert not diff and diff == ReportDiff()
    assert str(diff) == "mxnorm diff: no change"
    assert json.loads(diff.to_json()) == []


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("estimator", "exact", "estimator mxnorm -> exact"),
        ("gain", None, "gain fold -> None"),
        ("format", "mxfp8 e5m2", "format mxfp8 -> mxfp8 e5m2"),
        ("consumers", ("q",), "consumers (q, k) -> (q)"),
        ("residual", True, "residual False -> True"),
        ("status", "skipped", "status fused -> skipped"),
        ("reason", SkipReason.DISABLED, "reason None -> DISABLED"),
    ],
)
def test_every_field(field: str, value: Any, text: str) -> None:
    diff = report(graph(FUSED)).diff(report(graph(replace(FUSED, **{field: value}))))
    (change,) = only_graph(diff).changed
    assert change.site == SiteKey("a") and [c.field for c in change.fields] == [field]
    assert str(change) == f"a: {text}"


def test_node_names_and_lines_are_no_change() -> None:
    moved = replace(SKIPPED, detail="other", near_miss=NearMiss("mul_1", "32", "48", "x.py:9"))
    assert not report(graph(SKIPPED)).diff(report(graph(moved)))


def test_text_and_json() -> None:
    old = report(graph(FUSED, SKIPPED, ops_before={"mm": 2}, ops_after={"mm": 2, "cast": 1}))
    new_site = replace(FUSED, estimator="exact", gain="activation")
    new = report(
        graph(new_site, replace(SKIPPED, norm="c"), ops_before={"mm": 2}, ops_after={"mm": 3}),
        graph(FUSED, name="training"),
    )
    diff = old.diff(new)
    assert (
        str(diff)
        == """\
mxnorm diff: inference_0
  vanished b
  appeared c
  changed  a: estimator mxnorm -> exact, gain fold -> activation
  ops after the pass: cast 1 -> 0, mm 2 -> 3
mxnorm diff: training_1 appears
  appeared a"""
    )
    entries = json.loads(diff.to_json())
    assert entries[0]["vanished"] == [{"norm": "b", "call": 1}]
    assert entries[0]["changed"][0]["fields"][1] == {
        "field": "gain",
        "old": "fold",
        "new": "activation",
    }
    assert entries[0]["ops"][0] == {"op": "cast", "stage": "after", "old": 1, "new": 0}
    assert (entries[1]["old"], entries[1]["new"]) == (None, "training_1")


def test_a_norm_that_is_called_twice() -> None:
    twice = report(graph(FUSED, FUSED))
    change = only_graph(twice.diff(report(graph(FUSED, replace(FUSED, gain=None))))).changed[0]
    assert change.site == SiteKey("a", 2) and str(change).startswith("a (call 2): gain")
    assert only_graph(twice.diff(report(graph(FUSED)))).vanished == (SiteKey("a", 2),)
    assert only_graph(report(graph(FUSED)).diff(twice)).appeared == (SiteKey("a", 2),)


def test_graphs_are_paired_by_their_norms() -> None:
    """A graph in front moves all numbers; one that is cut in two goes with its larger half."""
    layers = [graph(replace(FUSED, norm=f"layers.{i}")) for i in range(3)]
    assert not report(*layers).diff(report(*reversed(layers)))

    sites = [replace(FUSED, norm=name) for name in "abc"]
    diff = report(graph(*sites)).diff(report(graph(sites[0]), graph(*sites[1:])))
    appears, cut = sorted(diff.graphs, key=lambda g: g.old is not None)
    assert (cut.old, cut.new, cut.vanished) == ("inference_0", "inference_1", (SiteKey("a"),))
    assert (appears.old, appears.new, appears.appeared) == (None, "inference_0", (SiteKey("a"),))


def test_training_is_compared_with_training() -> None:
    both = report(graph(FUSED, name="training"), graph(FUSED))
    assert only_graph(both.diff(report(graph(FUSED)))).old == "training_0"
    # Without another one inference and training are compared.
    diff = report(graph(FUSED)).diff(report(graph(FUSED, name="training")))
    assert not diff


sites = st.builds(
    Site,
    norm=st.sampled_from("abc"),
    status=st.sampled_from(["fused", "skipped"]),
    reason=st.sampled_from([None, *SkipReason]),
    consumers=st.lists(st.sampled_from("xy"), max_size=2).map(tuple),
)
graphs = st.builds(
    Graph,
    name=st.sampled_from(["inference", "training"]),
    before=st.just(""),
    after=st.just(""),
    ops_before=st.dictionaries(st.sampled_from("mn"), st.integers(1, 2)),
    sites=st.lists(sites, max_size=4).map(tuple),
)
reports = st.lists(graphs, max_size=3).map(lambda made: report(*made))


@given(reports, reports)
def test_any_two_reports(old: Report, new: Report) -> None:
    assert not old.diff(old)
    diff = old.diff(new)
    # Each graph takes part at most once, and what appears less what vanishes adds up.
    for side in ("old", "new"):
        names = [getattr(g, side) for g in diff.graphs if getattr(g, side) is not None]
        assert len(names) == len(set(names))
    gone = Counter(key.norm for g in diff.graphs for key in g.vanished)
    come = Counter(key.norm for g in diff.graphs for key in g.appeared)
    count = Counter(site.norm for site in old.sites)
    count.update(come)
    count.subtract(gone)
    assert +count == Counter(site.norm for site in new.sites)
    back = new.diff(old)
    assert bool(back) == bool(diff)
    assert json.loads(diff.to_json()) is not None and str(diff)


def test_two_configurations_of_a_model() -> None:
    def explained(**options: Any) -> Report:
        torch._dynamo.reset()
        options = {"inner": "aot_eager", **options}
        return mxnorm_pass.explain(Model(), inputs(), options=options)

    diff = explained().diff(explained(estimator="exact"))
    changed = only_graph(diff)
    assert [str(c) for c in changed.changed] == [
        "norm: estimator mxnorm -> exact, gain fold -> activation"
    ]
    assert {c.stage for c in changed.ops} == {"after"}
    assert not explained().diff(Report.from_json(explained().to_json()))
