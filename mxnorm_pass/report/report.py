"""All that was compiled, graph by graph: printed, compared, written to files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from textwrap import indent

from mxnorm_pass.files import write_text
from mxnorm_pass.report.diff import ReportDiff, diff
from mxnorm_pass.report.fold import fold
from mxnorm_pass.report.json_values import json_value
from mxnorm_pass.report.linear import linear_lines
from mxnorm_pass.report.site import Graph, Site

# A norm and the cast of its output in one op, with a residual add in front or not.
_NORM_CAST = re.compile(r"mxnorm_pass\.(add_)?norm_cast(_both)?\.default")


@dataclass
class Report:
    """What the pass did to every graph that was compiled, in order."""

    graphs: list[Graph] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """One Site per norm and graph."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def fused(self) -> list[Site]:
        return [site for site in self.sites if site.status == "fused"]

    @property
    def skipped(self) -> list[Site]:
        return [site for site in self.sites if site.status == "skipped"]

    def add(self, graph: Graph) -> None:
        """Append a graph, its name numbered by its place in this report."""
        self.graphs.append(replace(graph, name=f"{graph.name}_{len(self.graphs)}"))

    def __str__(self) -> str:
        """Norms that differ in their layer's number alone in one line; :meth:`table` has all."""
        return self._text(lambda graph: map(str, fold(graph.sites)))

    def table(self) -> str:
        """The same text with a line for each norm, under its full name."""
        return self._text(lambda graph: map(str, graph.sites))

    def _text(self, site_lines: Callable[[Graph], Iterable[str]]) -> str:
        if not self.graphs:
            return "mxnorm: no graph was compiled"
        lines = []
        for graph in self.graphs:
            fused = sum(site.status == "fused" for site in graph.sites)
            lines.append(
                f"mxnorm: {graph.name}: {len(graph.sites)} norms, {fused} fused, "
                f"{len(graph.sites) - fused} skipped"
            )
            lines += [indent(line, "  ") for line in site_lines(graph)]
            lines += [indent(line, "  ") for line in linear_lines(graph.linears)]
            lines += [f"  ops: {changes}" for changes in [_op_changes(graph)] if changes]
        return "\n".join(lines)

    def diff(self, other: Report) -> ReportDiff:
        """What changed from this report to the other; false where nothing did.

        Graphs are paired by their norms, sites by name and by which call of the norm they are.
        """
        return diff(self.graphs, other.graphs)

    def _repr_html_(self) -> str:
        from mxnorm_pass.report.table import render_table

        return render_table(self.graphs)

    def to_json(self) -> str:
        """The whole report as JSON; :meth:`from_json` reads it back."""
        return json.dumps(self.graphs, default=json_value, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        return cls(list(map(Graph.from_dict, json.loads(text))))

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one self-contained HTML page, for any browser, without a network.

        It shows each site's part of the graph before and after as diagram and code, and estimated
        bytes moved (see :mod:`mxnorm_pass.report.traffic`).

        Raises:
            OSError: ``path`` cannot be written; what stood there before stays.
            MissingExtraError: jinja2 is not installed.
        """
        from mxnorm_pass.report.page import render

        write_text(path, render(self.graphs))


def _op_changes(graph: Graph) -> str:
    """What the pass put in, and by how much it made the graph longer or shorter; "" for nothing.

    The counts of each op are ``ops_before`` and ``ops_after``.
    """
    before, after = graph.ops_before, graph.ops_after
    if before == after:
        return ""
    fused = sum(count for op, count in after.items() if _NORM_CAST.fullmatch(op))
    fused -= sum(count for op, count in before.items() if _NORM_CAST.fullmatch(op))
    more = sum(after.values()) - sum(before.values())
    calls = f"{abs(more)} {'more' if more > 0 else 'fewer'} calls" if more else "as many calls"
    return f"{fused} fused norm {'cast' if fused == 1 else 'casts'}, {calls}"
