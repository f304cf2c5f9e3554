"""Each site's part of the graph, and the bytes that it is estimated to move."""

from __future__ import annotations

import json
import re

import pytest
import torch
from models import build, example_inputs
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report
from mxnorm_pass.subgraph import Subgraph, Traffic

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
    weight = (W + W_VALUES + W_SCALES) + (W_VALUES + W_SCALES + W)
    rewritten = (X + GAIN + VALUES + SCALES + ROW) + (VALUES + SCALES + X) + weight
    after = Traffic(rewritten + X + W + Y, (X + GAIN + X) + (W + W) + X + W + Y)
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


def test_subgraphs_say_what_the_code_says(llama) -> None:
    (graph,) = llama.graphs
    codes = {"before": names_in(graph.before), "after": names_in(graph.after)}
    for site in graph.sites:
        for side, other in (("before", "after"), ("after", "before")):
            subgraph = getattr(site, side)
            if subgraph is None:
                continue
            for node in subgraph.nodes:
                if node.op in ("placeholder", "output"):
                    continue
                words = codes[side][node.name]
                assert set(node.inputs) <= words
                gone = node.name not in codes[other]
                assert gone == (node.change in ("removed", "added")), (side, node)
                if node.change == "rewired":
                    assert codes[other][node.name] != words


def test_every_node_that_came_or_went_belongs_to_a_site(llama) -> None:
    (graph,) = llama.graphs
    before, after = (set(names_in(code)) for code in (graph.before, graph.after))
    added = {n.name for s in llama.fused if s.after for n in s.after.nodes if n.change == "added"}
    assert added == after - before
    gone = {n.name for s in llama.fused if s.before for n in s.before.nodes}
    # Views that nobody reads any more, and sums that a dropped gradient leaves with one term.
    rest = [
        line.split("= ")[1]
        for line in graph.before.splitlines()
        if is_of(line, before - after - gone)
    ]
    assert all(re.match(r"torch.ops.aten.(alias|detach|view|add)\b", line) for line in rest), rest


def is_of(line: str, names: set[str]) -> bool:
    return line.strip().split(":")[0] in names


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
