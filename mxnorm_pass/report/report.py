"""All that was compiled, graph by graph: printed, compared, written to files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from textwrap import indent

from mxnorm_pass.extras import named_extras
from mxnorm_pass.files import write_text
from mxnorm_pass.report.diff import ReportDiff, diff
from mxnorm_pass.report.fold import folded_lines
from mxnorm_pass.report.json_values import json_value
from mxnorm_pass.report.site import Graph, Site


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
        """A line per norm; one for the norms of all equal layers. :meth:`table` has each apart."""
        return self._text(folded_lines)

    def table(self) -> str:
        """The report as text, with a line for every norm of every layer."""
        return self._text(lambda sites: map(str, sites))

    def _text(self, lines_of: Callable[[Sequence[Site]], Iterable[str]]) -> str:
        if not self.graphs:
            return "mxnorm: no graph was compiled"
        lines = []
        for graph in self.graphs:
            fused = sum(site.status == "fused" for site in graph.sites)
            lines.append(
                f"mxnorm: {graph.name}: {len(graph.sites)} norms, {fused} fused, "
                f"{len(graph.sites) - fused} skipped"
            )
            lines += [indent(line, "  ") for line in lines_of(graph.sites)]
            lines += [f"  {changes}" for changes in [_op_changes(graph)] if changes]
        return "\n".join(lines)

    def diff(self, other: Report) -> ReportDiff:
        """What changed from this report to the other; false where nothing did.

        Graphs are paired by their norms, sites by name and by which call of the norm they are.
        """
        return diff(self.graphs, other.graphs)

    def _repr_html_(self) -> str:
        with named_extras():
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
        """
        with named_extras():
            from mxnorm_pass.report.page import render
        write_text(path, render(self.graphs))


def _op_changes(graph: Graph) -> str:
    """What the pass did to the number of calls, in a few words; "" where nothing changed."""
    before, after = graph.ops_before, graph.ops_after
    if before == after:
        return ""
    norm_casts = sum(n - before.get(name, 0) for name, n in after.items() if "norm_cast" in name)
    fewer = sum(before.values()) - sum(after.values())
    return f"ops: {norm_casts} norm casts, {abs(fewer)} {'fewer' if fewer >= 0 else 'more'} in all"
