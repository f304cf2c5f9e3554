"""A report as a compact static table, for notebooks: no script, no style sheet, no graph code."""

from __future__ import annotations

from collections.abc import Sequence

from mxnorm_pass.extras import needs_extra

_TABLE = """<div>
{%- for graph in graphs %}
<details open>
<summary><b>{{ graph.name }}</b>: {{ graph.sites | length }} norms,
{{ graph.sites | selectattr("status", "equalto", "fused") | list | length }} fused,
{{ graph.sites | rejectattr("status", "equalto", "fused") | list | length }} skipped;
{{ graph.ops_before.values() | sum }} calls before,
{{ graph.ops_after.values() | sum }} after</summary>
<table>
<thead><tr><th>status</th><th>norm</th><th>consumers</th><th>how or why</th></tr></thead>
<tbody>
{%- for site in graph.sites %}
<tr><td style="color: {{ "#176f2c" if site.status == "fused" else "#9a3b00" }}">
{{- site.status }}</td>
<td style="text-align: left">{{ site.norm }}</td>
<td style="text-align: left">{{ site.consumers | join(", ") }}</td>
<td style="text-align: left">
{%- if site.reason %}<b title="{{ site.reason.cause }} {{ site.reason.cure }}">
{{- site.reason.name }}</b>: {{ site.reason.value }}
{%- if site.near_miss %}<br><small>{{ site.near_miss }}</small>
{%- elif site.detail %} ({{ site.detail }}){% endif %}
{%- else %}{{ site.how }}{% endif %}</td></tr>
{%- endfor %}
</tbody>
</table>
</details>
{%- else %}
<p>mxnorm: no graph was compiled</p>
{%- endfor %}
</div>
"""


def render_table(graphs: Sequence[object]) -> str:
    """The HTML for ``report.Graph`` objects; names and texts are escaped."""
    with needs_extra("report", "the table of a report"):
        from jinja2 import Environment

    return Environment(autoescape=True).from_string(_TABLE).render(graphs=graphs)
