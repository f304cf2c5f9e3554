"""A report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>mxnorm report</title>
<style>
  body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; }
  table { border-collapse: collapse; }
  th, td { text-align: left; vertical-align: top; padding: .2em .8em .2em 0; }
  tr.fused td:first-child { color: #176f2c; }
  tr.skipped td:first-child { color: #9a3b00; }
  pre { overflow-x: auto; background: #f5f5f5; padding: 1em; }
</style>
<h1>mxnorm report</h1>
{% for graph in graphs %}
<h2>{{ graph.name }}: {{ graph.sites | length }} norms</h2>
<table>
<tr><th>status<th>norm<th>consumers<th>how or why
{% for site in graph.sites %}
<tr class="{{ site.status }}"><td>{{ site.status }}<td>{{ site.norm }}
<td>{{ site.consumers | join(", ") }}
<td>{% if site.reason %}{{ site.reason.name }}: {{ site.reason.value }}
{%- if site.detail %} ({{ site.detail }}){% endif %}
{%- else %}{{ site.how }}{% endif %}
{% endfor %}
</table>
<details><summary>graph before</summary><pre>{{ graph.before }}</pre></details>
<details><summary>graph after</summary><pre>{{ graph.after }}</pre></details>
{% else %}
<p>No graph was compiled.
{% endfor %}
</html>
"""


def render(graphs: Sequence[object]) -> str:
    """The HTML for ``report.Graph`` objects; names and code are escaped."""
    return Environment(autoescape=True).from_string(_PAGE).render(graphs=graphs)
