"""Print the sites of equal layers as one line.

Layers are equal where everything that is printed of a site is, but for the number of the layer
after one prefix: ``model.layers.{0..31}.input_layernorm -> q_proj, k_proj, v_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mxnorm_pass.report.site import Site

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# What a layer's number is replaced by.
_ANY = "{}"


@dataclass(frozen=True)
class _Place:
    """A layer: ``model.layers`` and 3 of ``model.layers.3.input_layernorm``."""

    prefix: str
    number: int

    @classmethod
    def of(cls, name: str) -> _Place | None:
        found = _LAYER.search(name)
        return None if found is None else cls(name[: found.start(1)], int(found[1]))

    def without_number(self, text: str) -> str:
        """The text with this layer's number left open, wherever it names the layer."""
        own = rf"(?<![\w.]){re.escape(self.prefix)}{self.number}(?![\w])"
        return re.sub(own, f"{self.prefix}{_ANY}".replace("\\", r"\\"), text)


def folded_lines(sites: Iterable[Site]) -> list[str]:
    """One text per site, or per sites of equal layers, where the first of them stands."""
    groups: dict[Site, list[Site]] = {}
    for site in sites:
        groups.setdefault(_pattern(site), []).append(site)
    return [_text(pattern, group) for pattern, group in groups.items()]


def _pattern(site: Site) -> Site:
    """What is printed of a site, with its layer's number and the names of nodes left open."""
    printed = replace(site, before=None, after=None)
    place = _Place.of(site.norm)
    if place is None:
        return printed
    miss = site.near_miss
    if miss is not None:
        found, expected = map(place.without_number, (miss.found, miss.expected))
        miss = replace(miss, node="", found=found, expected=expected)
    return replace(
        printed,
        norm=place.without_number(site.norm),
        consumers=tuple(map(place.without_number, site.consumers)),
        detail=place.without_number(site.detail),
        near_miss=miss,
    )


def _text(pattern: Site, sites: Sequence[Site]) -> str:
    if len(sites) == 1:
        return str(sites[0])
    numbers = [place.number for site in sites if (place := _Place.of(site.norm)) is not None]
    if len(numbers) < len(sites) or len(set(numbers)) < len(numbers):
        # Several calls of one norm: each has its line.
        return "\n".join(map(str, sites))
    # The near miss is shown of the first layer, with its nodes.
    return str(
        replace(
            pattern,
            norm=pattern.norm.replace(_ANY, _ranges(numbers)),
            consumers=_short(pattern.consumers, _ranges(numbers)),
            detail=pattern.detail.replace(_ANY, _ranges(numbers)),
            near_miss=sites[0].near_miss,
        )
    )


def _short(names: Sequence[str], numbers: str) -> tuple[str, ...]:
    """The last components of the names; the whole names where these are not all different."""
    last = tuple(name.rpartition(".")[2] for name in names)
    if len(set(last)) == len(last):
        return last
    return tuple(name.replace(_ANY, numbers) for name in names)


def _ranges(numbers: Iterable[int]) -> str:
    """{0, 2..5} of 0, 2, 3, 4 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = (f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"{{{', '.join(parts)}}}"
