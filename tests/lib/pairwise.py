"""Products of parameters of which the default run takes a part, and the full run each pair.

A row that the default run leaves out carries the marker ``full``; one whose pairs of values all
occur in other rows, ``exhaustive``. Where the test itself is of the full run alone, the rows that
its own default leaves out wait for the exhaustive run (``tests/conftest.py``), too. What costs is
compiles, and a mistake shows where two values meet, seldom only where three do: so the parts are
pairwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations, product
from typing import Any

import pytest

# Values in a list, or by the names that they have in the test's id.
Values = Mapping[str, Any] | Iterable[Any]
Row = tuple[Any, ...]


def pairwise(**values: Values) -> pytest.MarkDecorator:
    """Parametrize with a product; by default each pair of values of two parameters occurs."""
    return _marked(values, lambda rows: covering(rows, 2))


def each_value(full: int = 2, **values: Values) -> pytest.MarkDecorator:
    """Parametrize with a product; by default each value of a parameter occurs."""
    return _marked(values, lambda rows: covering(rows, 1), full)


def some(default: Collection[str], full: int = 2, **values: Values) -> pytest.MarkDecorator:
    """Parametrize with a product; by default the rows of these ids occur.

    In the full run each pair of values does, or, with 1, each value: where parameters have nothing
    to do with each other; with 0 no more than by default: where each row costs a minute.
    """
    known = {_id(row) for row in _rows(values)}
    assert known.issuperset(default), f"{set(default) - known} not in {known}"
    return _marked(values, lambda rows: [row for row in rows if _id(row) in default], full)


def covering(rows: Iterable[Row], strength: int, chosen: Iterable[Row] = ()) -> list[Row]:
    """Few of the rows, in which the values of each ``strength`` columns meet as they do in all.

    Greedy, twice: of rows that are equally good the one whose values were chosen less often, so
    that all are seen about as often, or the first. Those of ``chosen`` are among them; where they
    have seen to variety, the first values, as a single layer, are as good and cheaper.
    """
    rows, chosen = list(rows), list(chosen)
    found = [_greedy(rows, strength, chosen, spread) for spread in (not chosen, bool(chosen))]
    return min(found, key=len)


def _greedy(rows: list[Row], strength: int, chosen: list[Row], spread: bool) -> list[Row]:
    meetings = {row: set(combinations(enumerate(row), min(strength, len(row)))) for row in rows}
    uncovered = set().union(*meetings.values()).difference(*(meetings[row] for row in chosen))
    used = Counter(cell for row in chosen for cell in enumerate(row))
    chosen = list(chosen)

    def gain(row: Row) -> tuple[int, int]:
        seen = sum(used[cell] for cell in enumerate(row)) if spread else 0
        return len(uncovered & meetings[row]), -seen

    while uncovered:
        best = max(meetings, key=gain)
        uncovered -= meetings[best]
        used.update(enumerate(best))
        chosen.append(best)
    return chosen


def _rows(values: Mapping[str, Values]) -> list[Row]:
    """Of the values' ids, which can be hashed."""
    return list(product(*(_named(given) for given in values.values())))


def _marked(
    values: Mapping[str, Values], choose: Callable[[list[Row]], list[Row]], strength: int = 2
) -> pytest.MarkDecorator:
    named = [_named(given) for given in values.values()]
    rows = _rows(values)
    chosen = choose(rows)
    default, full = set(chosen), set(covering(rows, strength, chosen))

    def marks(row: Row) -> tuple[pytest.MarkDecorator, ...]:
        left_out = ((pytest.mark.full, default), (pytest.mark.exhaustive, full))
        return tuple(mark for mark, taken in left_out if row not in taken)

    params = [
        pytest.param(
            *(column[name] for column, name in zip(named, row, strict=True)),
            id=_id(row),
            marks=marks(row),
        )
        for row in rows
    ]
    return pytest.mark.parametrize(",".join(values), params)


def _named(values: Values) -> dict[str, Any]:
    if isinstance(values, Mapping):
        return dict(values)
    values = list(values)
    named = {getattr(value, "__name__", str(value)): value for value in values}
    assert len(named) == len(values), f"two of {values} have one name"
    return named


def _id(row: Row) -> str:
    return "-".join(row)
