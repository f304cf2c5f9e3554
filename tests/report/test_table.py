"""The table that notebooks show of a report."""

from __future__ import annotations

from html.parser import HTMLParser

from mxnorm_pass import Graph, NearMiss, Report, Site, SkipReason

HOSTILE = "<script>alert('&')</script>"
FUSED = Site("layers.0.norm", ("q", "k"), "fused", estimator="mxnorm", gain="fold", format="mxfp8")
SKIPPED = Site(
    "norm",
    reason=SkipReason.NO_MX_CAST,
    detail="lm_head",
    near_miss=NearMiss("mm", "a cast", "lm_head", "llama.py:1: lm_head(x)"),
)
VOID = {"br"}


class Cells(HTMLParser):
    """The rows of all tables as texts, and whether each tag that opens closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open += [tag] if tag not in VOID else []
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self._open:
            self.rows[-1][-1] += data


def cells(*graphs: Graph) -> Cells:
    report = Report()
    for graph in graphs:
        report.add(graph)
    return Cells(report._repr_html_())


def test_one_row_per_site() -> None:
    counts = {"ops_before": {"mm": 2, "mul": 5}, "ops_after": {"mm": 3}}
    found = cells(Graph("training", "", "", sites=(FUSED, SKIPPED), **counts))
    assert [row for row in found.rows if row] == [
        ["fused", "layers.0.norm", "q, k", FUSED.how],
        ["skipped", "norm", "", f"NO_MX_CAST: {SKIPPED.reason.value}{SKIPPED.near_miss}"],
    ]
    summary = " ".join(found.text.split())
    expected = "training_0: 2 norms, 1 fused, 1 skipped; 7 calls before, 3 after"
    assert summary.startswith(expected)


def test_a_detail_without_a_near_miss() -> None:
    site = Site("norm", reason=SkipReason.DISABLED, detail="modules turns 'norm' off")
    (_, row) = cells(Graph("inference", "", "", sites=(site,))).rows
    assert row[-1] == f"DISABLED: {site.reason.value} ({site.detail})"


def test_everything_is_escaped_and_static() -> None:
    near_miss = NearMiss(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    site = Site(HOSTILE, (HOSTILE,), reason=SkipReason.WIDTH, detail=HOSTILE, near_miss=near_miss)
    plain = Site(HOSTILE, reason=SkipReason.WIDTH, detail=HOSTILE)
    fused = Site(HOSTILE, (HOSTILE,), "fused", estimator=HOSTILE, format=HOSTILE)
    found = cells(Graph(HOSTILE, HOSTILE, HOSTILE, sites=(site, plain, fused)))
    assert found.tags.isdisjoint({"script", "style", "link", "img", "iframe"})
    assert found.rows[1][1] == HOSTILE and str(near_miss) in found.rows[1][3]
    assert HOSTILE in found.rows[2][3] and HOSTILE in found.rows[3][3]


def test_no_graphs() -> None:
    assert "no graph was compiled" in cells().text
