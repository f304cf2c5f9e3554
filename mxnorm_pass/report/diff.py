"""What changed between two reports, such as those of two configurations or two versions.

It knows reports by their fields alone, which lets ``report`` import it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import product
from typing import Any, Literal, Protocol

# What is compared of a site that both reports have.
FIELDS = ("status", "reason", "estimator", "gain", "format", "consumers", "residual", "calibration")


class _Site(Protocol):
    @property
    def norm(self) -> str: ...


class _Graph(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def sites(self) -> Sequence[_Site]: ...
    @property
    def ops_before(self) -> Mapping[str, int]: ...
    @property
    def ops_after(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class SiteKey:
    """A site within its graph: the norm's name, and which call of it, counted from 1."""

    norm: str
    call: int = 1

    def __str__(self) -> str:
        return self.norm if self.call == 1 else f"{self.norm} (call {self.call})"


@dataclass(frozen=True)
class FieldChange:
    """A field of a site; reasons are names, consumers tuples of names."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field} {_text(self.old)} -> {_text(self.new)}"


@dataclass(frozen=True)
class SiteChange:
    """A site of both reports with at least one other field."""

    site: SiteKey
    fields: tuple[FieldChange, ...]

    def __str__(self) -> str:
        return f"{self.site}: {', '.join(map(str, self.fields))}"


@dataclass(frozen=True)
class OpChange:
    """How often an op is called in the graph ``before`` or ``after`` the pass."""

    op: str
    stage: Literal["before", "after"]
    old: int
    new: int

    def __str__(self) -> str:
        return f"{self.op} {self.old} -> {self.new}"


@dataclass(frozen=True)
class GraphDiff:
    """What changed of one graph.

    Attributes:
        old, new: its names; None in the report that has no such graph.
        vanished, appeared: sites that only the old or only the new report has.
        changed: sites of both that differ in one of ``FIELDS``.
        ops: op counts that differ; empty for a graph that only one report has.
    """

    old: str | None
    new: str | None
    vanished: tuple[SiteKey, ...] = ()
    appeared: tuple[SiteKey, ...] = ()
    changed: tuple[SiteChange, ...] = ()
    ops: tuple[OpChange, ...] = ()

    def __bool__(self) -> bool:
        paired = self.old is not None and self.new is not None
        return not paired or any((self.vanished, self.appeared, self.changed, self.ops))

    def __str__(self) -> str:
        return "\n".join([f"mxnorm diff: {self._title()}", *self._lines()])

    def _title(self) -> str:
        if self.old is None:
            return f"{self.new} appears"
        if self.new is None:
            return f"{self.old} vanishes"
        return self.old if self.old == self.new else f"{self.old} -> {self.new}"

    def _lines(self) -> Iterator[str]:
        yield from (f"  vanished {site}" for site in self.vanished)
        yield from (f"  appeared {site}" for site in self.appeared)
        yield from (f"  changed  {change}" for change in self.changed)
        for stage in ("before", "after"):
            changes = [str(change) for change in self.ops if change.stage == stage]
            if changes:
                yield f"  ops {stage} the pass: {', '.join(changes)}"


@dataclass(frozen=True)
class ReportDiff:
    """What changed from an old report to a new one; false where nothing did.

    Attributes:
        graphs: the graphs that changed, in the old report's order, new ones last.
    """

    graphs: tuple[GraphDiff, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.graphs)

    def __str__(self) -> str:
        return "\n".join(map(str, self.graphs)) or "mxnorm diff: no change"

    def to_json(self) -> str:
        """The fields of this class and those in it, by name."""
        return json.dumps([asdict(graph) for graph in self.graphs], indent=1)


def diff(old: Sequence[_Graph], new: Sequence[_Graph]) -> ReportDiff:
    """Compare the graphs of two reports, paired by their norms and not by their places."""
    pairs = _pairs(old, new)
    differences = [_graph_diff(a, b) for a, b in pairs]
    return ReportDiff(tuple(d for d in differences if d))


def _pairs(
    old: Sequence[_Graph], new: Sequence[_Graph]
) -> Iterator[tuple[_Graph | None, _Graph | None]]:
    """Equal lists of norms first, in order; then the most norms in common."""
    places: defaultdict[Any, deque[int]] = defaultdict(deque)
    for j, graph in enumerate(new):
        places[_norms(graph), _kind(graph)].append(j)
    paired = {}
    for i, graph in enumerate(old):
        same = places[_norms(graph), _kind(graph)]
        if same:
            paired[i] = same.popleft()
    left = [i for i in range(len(old)) if i not in paired]
    right = sorted(j for rest in places.values() for j in rest)
    for _, i, j in sorted(_similarities(old, new, left, right)):
        if i not in paired and j in right:
            paired[i] = j
            right.remove(j)
    for i, graph in enumerate(old):
        yield graph, new[paired[i]] if i in paired else None
    yield from ((None, new[j]) for j in right)


def _similarities(
    old: Sequence[_Graph], new: Sequence[_Graph], left: Sequence[int], right: Sequence[int]
) -> Iterator[tuple[tuple[bool, int], int, int]]:
    """(rank, i, j) of the graphs with norms in common, the most similar with the lowest rank."""
    norms = {id(g): Counter(_norms(g)) for g in (*old, *new)}
    for i, j in product(left, right):
        common = (norms[id(old[i])] & norms[id(new[j])]).total()
        if common:
            yield (_kind(old[i]) != _kind(new[j]), -common), i, j


def _norms(graph: _Graph) -> tuple[str, ...]:
    return tuple(site.norm for site in graph.sites)


def _kind(graph: _Graph) -> str:
    """ "inference" or "training": the name without its number."""
    return graph.name.partition("_")[0]


def _graph_diff(old: _Graph | None, new: _Graph | None) -> GraphDiff:
    before, after = _by_key(old), _by_key(new)
    changes = (SiteChange(k, _changes(before[k], after[k])) for k in before if k in after)
    return GraphDiff(
        old=old.name if old is not None else None,
        new=new.name if new is not None else None,
        vanished=tuple(key for key in before if key not in after),
        appeared=tuple(key for key in after if key not in before),
        changed=tuple(change for change in changes if change.fields),
        ops=tuple(_op_changes(old, new)) if old is not None and new is not None else (),
    )


def _by_key(graph: _Graph | None) -> dict[SiteKey, _Site]:
    calls: Counter[str] = Counter()
    found = {}
    for site in graph.sites if graph is not None else ():
        calls[site.norm] += 1
        found[SiteKey(site.norm, calls[site.norm])] = site
    return found


def _changes(old: _Site, new: _Site) -> tuple[FieldChange, ...]:
    values = ((name, _plain(getattr(old, name)), _plain(getattr(new, name))) for name in FIELDS)
    return tuple(FieldChange(name, a, b) for name, a, b in values if a != b)


def _op_changes(old: _Graph, new: _Graph) -> Iterator[OpChange]:
    yield from _count_changes("before", old.ops_before, new.ops_before)
    yield from _count_changes("after", old.ops_after, new.ops_after)


def _count_changes(
    stage: Literal["before", "after"], old: Mapping[str, int], new: Mapping[str, int]
) -> Iterator[OpChange]:
    for op in sorted(old.keys() | new.keys()):
        a, b = old.get(op, 0), new.get(op, 0)
        if a != b:
            yield OpChange(op, stage, a, b)


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _text(value: Any) -> str:
    return "(" + ", ".join(value) + ")" if isinstance(value, tuple) else str(value)
