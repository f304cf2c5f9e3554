"""Sites that differ in the number of their layer alone, folded into one line.

In a folded name ``layers.{0, 2..5}.norm`` the braces hold the numbers; where other names of the
line begin alike, ``layers.{0, 2..5}.q``, theirs stand for the same number. Folding is by printed
text: what a line says of the first of its sites it says of all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from mxnorm_pass.report.numbers import number_set
from mxnorm_pass.report.site import NearMiss, Site

# Stands for the number while sites are compared; no name and no line of code has it.
_HOLE = "\0"
_NUMBER = re.compile(r"0|[1-9]\d*")
_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?![\w.])")


@dataclass(frozen=True)
class Folded:
    """Sites that are printed as one.

    Attributes:
        site: the first of them, with the numbers of all in its names and texts; its near miss
            keeps the first one's node. Without its part of the graph.
        count: how many there are.
        call: which call of their norms in the graph they are, counted from 1.
    """

    site: Site
    count: int = 1
    call: int = 1

    def __str__(self) -> str:
        if self.count == 1:
            return str(self.site)
        site = self.site
        if site.status == "fused":
            return str(replace(site, consumers=(_consumers(site.norm, site.consumers),)))
        if site.near_miss is None:
            return str(site)
        alike = f"{site.near_miss.node} and {self.count - 1} alike"
        return str(replace(site, near_miss=replace(site.near_miss, node=alike)))


def fold(sites: Sequence[Site]) -> list[Folded]:
    """Fold what is equal but for a layer's number, each group at the place of its first site.

    Numbers further inside of a name are folded first: ``stages.{0, 1}.blocks.{0..3}.norm``.
    """
    calls: Counter[str] = Counter()
    entries = []
    for site in sites:
        calls[site.norm] += 1
        entries.append((site, Folded(replace(site, before=None, after=None), 1, calls[site.norm])))
    named = [(entry, _node_names(site)) for site, entry in entries]
    depth = max((len(_number_places(site.norm)) for site in sites), default=0)
    for level in reversed(range(depth)):
        named = list(_fold_level(named, level))
    return [entry for entry, _ in named]


_Named = tuple[Folded, frozenset[str]]


def _fold_level(entries: Iterable[_Named], level: int) -> Iterator[_Named]:
    """Fold over the ``level``-th number of the norms' names."""
    groups: dict[object, list[tuple[int, _Named]]] = {}
    for place, (entry, nodes) in enumerate(entries):
        prefix, number = _split(entry.site.norm, level)
        if not number:
            groups[place] = [(-1, (entry, nodes))]
            continue
        holed = _renumbered(entry.site, prefix, number, _HOLE)
        key = (_without_nodes(holed, nodes), entry.count, entry.call)
        groups.setdefault(key, []).append((int(number), (entry, nodes)))
    for members in groups.values():
        _, (first, nodes) = members[0]
        if len(members) > 1:
            numbers = f"{{{number_set(number for number, _ in members)}}}"
            site = _renumbered(first.site, *_split(first.site.norm, level), numbers)
            first = Folded(site, first.count * len(members), first.call)
        yield first, nodes


def _number_places(name: str) -> list[int]:
    return [i for i, part in enumerate(name.split(".")) if _NUMBER.fullmatch(part)]


def _split(name: str, level: int) -> tuple[str, str]:
    """What is in front of the ``level``-th number of a name, and that; "" if it has fewer."""
    places = _number_places(name)
    if level >= len(places):
        return name, ""
    parts = name.split(".")
    return "".join(f"{part}." for part in parts[: places[level]]), parts[places[level]]


def _renumbered(site: Site, prefix: str, number: str, new: str) -> Site:
    """The site with another number behind ``prefix`` in its names and texts."""
    old = re.escape(prefix + number)
    name = re.compile(rf"{old}(?![^.])")
    # In a text a bare number may mean anything but where a name or a quote begins with it.
    part = rf"{old}(?!\w)" if prefix else rf"{old}(?=\.[A-Za-z_])|(?<='){old}(?=[.'])"
    in_text = re.compile(rf"(?<![\w.])(?:{part})")

    def renamed(text: str) -> str:
        return f"{prefix}{new}{text[len(prefix + number) :]}" if name.match(text) else text

    def renumber(text: str) -> str:
        return in_text.sub(lambda _: prefix + new, text)

    return replace(
        site,
        norm=renamed(site.norm),
        consumers=tuple(map(renamed, site.consumers)),
        detail=renumber(site.detail),
        near_miss=_changed(site.near_miss, renumber),
    )


def _changed(miss: NearMiss | None, change: Callable[[str], str]) -> NearMiss | None:
    if miss is None:
        return None
    return replace(miss, expected=change(miss.expected), found=change(miss.found))


def _node_names(site: Site) -> frozenset[str]:
    """The nodes of a site's part of the graph, which texts may name."""
    names = [node.name for node in site.before.nodes] if site.before else []
    return frozenset([*names, *([site.near_miss.node] if site.near_miss else [])])


def _without_nodes(site: Site, nodes: frozenset[str]) -> Site:
    """The site with nodes named by their kind: the number behind it differs from layer to layer."""

    def name_kind(match: re.Match[str]) -> str:
        word = match[0]
        return re.sub(r"_\d+$", "", word) + _HOLE if word in nodes else word

    def strip(text: str) -> str:
        return _WORD.sub(name_kind, text)

    miss = _changed(site.near_miss, strip)
    return replace(
        site,
        detail=strip(site.detail),
        near_miss=replace(miss, node=strip(miss.node)) if miss else None,
    )


def _consumers(norm: str, consumers: Sequence[str]) -> str:
    """``.self_attn.{q_proj, k_proj}``: a name that starts with a dot is inside the norm's layer."""
    layer = norm[: norm.rindex("}") + 1]
    split = [name.removeprefix(layer).rpartition(".") for name in consumers]
    texts = []
    for (parent, dot), group in groupby(split, lambda parts: parts[:2]):
        names = [parts[2] for parts in group]
        inside = f"{{{', '.join(names)}}}" if len(names) > 1 and dot else ", ".join(names)
        texts.append(f"{parent}{dot}{inside}")
    return ", ".join(texts)
