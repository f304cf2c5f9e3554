"""Each site's part of the graph, and the bytes that it is estimated to move."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from models import build, example_inputs
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report
from mxnorm_pass.report.subgraph import Subgraph, Traffic

ROWS, WIDTH, OUT = 64, 128, 256
X, W, GAIN = 4 * ROWS * WIDTH, 4 * WIDTH * OUT, 4 * WIDTH
ROW, Y = 4 * ROWS, 4 * ROWS * OUT
VALUES, SCALES = ROWS * WIDTH, ROWS * WIDTH // 32
W_VALUES, W_SCALES = WIDTH * OUT, WIDTH * OUT // 32


class Block(nn.Module):
    """fp32 norm and linear; in eager mode: pow, mean, + eps, rsqrt, * x, * gain, mm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.proj = nn.Linear(WIDTH, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(self.norm(x))
        return y


def explain_block(rows: int = ROWS, dynamic: bool = False, **options: object) -> Report:
    x = torch.randn(rows, WIDTH)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        return mxnorm_pass.explain(Block(), x, options=options)


def of_part(subgraph: Subgraph | None, part: str) -> list[str]:
    assert subgraph is not None
    return [node.op for node in subgraph.nodes if node.part == part and node.bytes != 0]


def test_traffic_of_a_norm_and_its_linear_by_hand() -> None:
    (graph,) = explain_block(gain="activation").graphs
    (site,) = graph.sites
    assert site.before is not None and site.after is not None
    norm = 2 * X + (X + ROW) + 2 * ROW + 2 * ROW + (2 * X + ROW) + (2 * X + GAIN)
    before = Traffic(norm + X + W + Y, X + GAIN + 2 * X + W + Y)
    assert site.before.traffic == graph.traffic_before == before
    rewritten = X + GAIN + VALUES + SCALES
    weight = W + W_VALUES + W_SCALES
    linear = VALUES + SCALES + W_VALUES + W_SCALES + Y
    after = Traffic(rewritten + ROW + weight + linear, rewritten + weight + linear)
    assert site.after.traffic == graph.traffic_after == after


def test_symbolic_sizes_count_with_their_hint() -> None:
    static, dynamic = explain_block().graphs[0], explain_block(dynamic=True).graphs[0]
    assert re.search(rf"f32\[s\d+, {WIDTH}\]", dynamic.before), "the rows are symbolic"
    assert dynamic.traffic_before == static.traffic_before


def test_views_and_picked_rows() -> None:
    def model(table: Tensor, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, table).transpose(0, 1)[1:].expand(3, -1, -1) + 1

    args = torch.randn(1000, 32), torch.zeros(5, 2, dtype=torch.long)
    with torch.no_grad():
        (graph,) = mxnorm_pass.explain(model, *args).graphs
    ids, rows = 8 * 10, 4 * 10 * 32
    kept = 4 * 5 * 32
    assert graph.traffic_before is not None
    assert graph.traffic_before.unfused == (rows + ids + rows) + (kept + 3 * kept)


@pytest.fixture(scope="module")
def llama() -> Report:
    model = build("Llama")
    return mxnorm_pass.explain(model, **example_inputs(model))


@pytest.mark.full
def test_parts_of_a_fused_and_a_skipped_site(llama) -> None:
    fused, skipped = llama.sites[1], llama.sites[-1]
    assert "aten.rsqrt.default" in of_part(fused.before, "norm")
    assert of_part(fused.before, "linear") == 2 * ["aten.mm.default"]
    assert of_part(fused.before, "residual add") == ["aten.add.Tensor"]
    assert "aten.rsqrt.default" not in of_part(fused.after, "norm")
    assert of_part(fused.after, "norm and cast") == ["mxnorm_pass.add_norm_cast.default"]
    assert of_part(fused.after, "linear") == 2 * ["aten.mm.default"]
    assert len(of_part(fused.after, "norm backward")) > 10
    assert skipped.after is None and "aten.rsqrt.default" in of_part(skipped.before, "norm")


def names_in(code: str) -> dict[str, set[str]]:
    """By name of each node: the words of its line."""
    found = re.findall(r'^    (\w+)(?:: "[^"]*")? = (.*)$', code, re.MULTILINE)
    return {name: set(re.findall(r"\w+", rest)) for name, rest in found}


@pytest.fixture(scope="module")
def inference() -> Report:
    model = build("Llama")
    with torch.no_grad():
        return mxnorm_pass.explain(model, **example_inputs(model))


@pytest.mark.parametrize("report", ["llama", "inference"])
def test_subgraphs_read_what_the_code_reads(report: str, request: pytest.FixtureRequest) -> None:
    (graph,) = request.getfixturevalue(report).graphs
    codes = {"before": names_in(graph.before), "after": names_in(graph.after)}
    for site in graph.sites:
        for side, code in codes.items():
            subgraph = getattr(site, side)
            for node in subgraph.nodes if subgraph is not None else ():
                if node.op not in ("placeholder", "output"):
                    assert set(node.inputs) <= code[node.name]


def test_changes_are_those_of_the_code(inference) -> None:
    """In inference, where the graph is traced once, a node keeps its name."""
    (graph,) = inference.graphs
    codes = {"before": names_in(graph.before), "after": names_in(graph.after)}
    for site in inference.fused:
        for side, other in (("before", "after"), ("after", "before")):
            for node in getattr(site, side).nodes:
                if node.op in ("placeholder", "output"):
                    continue
                gone = node.name not in codes[other]
                assert gone == (node.change in ("removed", "added")), (side, node)
                if node.change == "rewired":
                    assert codes[other][node.name] != codes[side][node.name]


def test_every_node_that_came_or_went_belongs_to_a_site(inference) -> None:
    (graph,) = inference.graphs
    before, after = (set(names_in(code)) for code in (graph.before, graph.after))
    assert nodes_of(inference, "after", "added").keys() == after - before
    assert nodes_of(inference, "before", "removed").keys() == before - after


def test_every_op_that_came_or_went_belongs_to_a_site(llama) -> None:
    """Of a graph that is traced twice, whose nodes have other names each time."""
    (graph,) = llama.graphs
    added = Counter(nodes_of(llama, "after", "added").values())
    removed = Counter(nodes_of(llama, "before", "removed").values())
    ops = {*graph.ops_before, *graph.ops_after}
    growth = {op: graph.ops_after.get(op, 0) - graph.ops_before.get(op, 0) for op in ops}
    assert {op: added[op] - removed[op] for op in ops} == growth


def nodes_of(report: Report, side: str, change: str) -> dict[str, str]:
    """Names and ops of the nodes in the parts of fused sites that have come or gone."""
    cuts = [getattr(site, side) for site in report.fused]
    return {n.name: n.op for cut in cuts for n in cut.nodes if n.change == change}


def test_reports_of_older_versions_load(llama) -> None:
    entries = json.loads(llama.to_json())
    for graph in entries:
        del graph["traffic_before"], graph["traffic_after"]
        for site in graph["sites"]:
            del site["before"], site["after"]
    old = Report.from_json(json.dumps(entries))
    assert [str(site) for site in old.sites] == [str(site) for site in llama.sites]
    assert all(site.before is None for site in old.sites)
    assert Report.from_json(llama.to_json()) == llama
