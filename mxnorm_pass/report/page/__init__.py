"""A report as one HTML page that needs nothing else: no network, no files beside it.

The table of sites is plain HTML. What a click opens is drawn from the report's data, which the page
holds once, compressed; so is the library that lays the diagrams out (Viz.js: Graphviz as
WebAssembly), which is started by the first click.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mxnorm_pass.extras import needs_extra
from mxnorm_pass.report.json_values import json_value

with needs_extra("report", "the page of a report"):
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

_FOLDER = Path(__file__).parent
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def render(graphs: Sequence[Any]) -> str:
    """The page for ``report.Graph`` objects; names and code are escaped."""
    loader = FileSystemLoader(_FOLDER)
    environment = Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "status": _status,
        "layer": _layer,
        "relative": _relative,
        "breakable": _breakable,
        "bytes": bytes_text,
        "change": change_text,
    }
    return environment.get_template("template.html").render(
        graphs=graphs,
        sites=[site for graph in graphs for site in graph.sites],
        css=Markup(_read("page.css")),
        script=Markup(_read("diagram.js") + _read("page.js")),
        data=_compressed(json.dumps(_data(graphs), default=json_value).encode()),
        library=_library(),
    )


def _data(graphs: Sequence[Any]) -> dict[str, Any]:
    """What the scripts read: the graphs, and what the reasons in them mean."""
    reasons = {site.reason for graph in graphs for site in graph.sites if site.reason}
    texts = {r.name: {"sentence": r.value, "cause": r.cause, "cure": r.cure} for r in reasons}
    return {"graphs": graphs, "reasons": dict(sorted(texts.items()))}


def bytes_text(count: int | None) -> str:
    """A number of bytes for people, "1.5 MiB"; "unknown" for None."""
    if count is None:
        return "unknown"
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def change_text(before: int | None, after: int | None) -> str:
    """How much more or less, "−12%"; "" where there is nothing to compare."""
    if not before or after is None:
        return ""
    change = round(100 * (after / before - 1))
    return "±0%" if change == 0 else f"{change:+d}%".replace("-", "−")


def _status(site: Any) -> str:
    """ "fused", "exact" or "skipped": how the site is coloured."""
    return "exact" if site.status == "fused" and site.estimator == "exact" else site.status


def _layer(name: str) -> str:
    """The number of the layer in a module's name, "" if it has none."""
    found = _LAYER.search(name)
    return found[1] if found else ""


def _relative(name: str, norm: str) -> str:
    """A consumer's name without the modules that it shares with its norm."""
    own, shared = name.split("."), norm.split(".")
    while len(own) > 1 and len(shared) > 1 and own[0] == shared[0]:
        own, shared = own[1:], shared[1:]
    return ".".join(own)


def _breakable(name: str) -> Markup:
    """The name with places where a narrow column may break it."""
    return Markup(".<wbr>").join(name.split("."))


@cache
def _library() -> str:
    return _compressed((_FOLDER / "vendor" / "viz-global.js").read_bytes())


def _compressed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


@cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
