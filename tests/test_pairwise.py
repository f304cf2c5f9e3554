"""What the default run leaves out of a product, and what it must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
from pairwise import covering, each_value, pairwise, some

VALUES: dict[str, Any] = {"a": range(6), "b": ["x", "y", "z"], "c": [True, False], "d": range(4)}
SIZES = [(2, 2, 2), (6, 4, 3), (3, 3, 3, 3), (2, 5, 2, 4, 3), (7,), (7, 2), (1, 1)]


def default(mark: pytest.MarkDecorator) -> list[tuple[Any, ...]]:
    return [row.values for row in mark.args[1] if not row.marks]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_all_values_meet(sizes: tuple[int, ...], strength: int) -> None:
    rows = list(product(*map(range, sizes)))
    chosen = covering(rows, strength)
    assert len(set(chosen)) == len(chosen)
    for columns in combinations(range(len(sizes)), min(strength, len(sizes))):
        for meeting in product(*(range(sizes[column]) for column in columns)):
            assert any(tuple(row[c] for c in columns) == meeting for row in chosen), meeting


def test_pairs_are_few() -> None:
    assert len(covering(product(range(6), range(4), range(3)), 2)) <= 26
    assert len(covering(product(range(3), repeat=4), 2)) <= 15


def test_a_short_column_is_shared_by_a_long_one() -> None:
    chosen = covering(product(range(20), "abc"), 1)
    counts = Counter(letter for _, letter in chosen)
    assert len(chosen) == 20 and sorted(counts.values()) == [6, 7, 7]


def test_every_pair_occurs_in_the_default_rows() -> None:
    rows = default(pairwise(**VALUES))
    for one, other in combinations(range(len(VALUES)), 2):
        pairs = {(row[one], row[other]) for row in rows}
        assert pairs == set(product(list(VALUES.values())[one], list(VALUES.values())[other]))


def test_every_value_occurs_in_the_default_rows() -> None:
    rows = default(each_value(**VALUES))
    assert len(rows) == 6
    for column, values in enumerate(VALUES.values()):
        assert {row[column] for row in rows} == set(values)


@pytest.mark.parametrize("decorate", [pairwise, each_value, partial(some, ["5-z-False-3"])])
def test_the_full_run_has_every_pair(decorate: Callable[..., pytest.MarkDecorator]) -> None:
    mark = decorate(**VALUES)
    assert [row.values for row in mark.args[1]] == list(product(*VALUES.values()))
    marks = [[m.name for m in row.marks] for row in mark.args[1]]
    assert all(names in ([], ["full"], ["full", "exhaustive"]) for names in marks)
    full = [row.values for row, names in zip(mark.args[1], marks, strict=True) if len(names) < 2]
    assert len(full) <= 26
    for one, other in combinations(range(len(VALUES)), 2):
        pairs = {(row[one], row[other]) for row in full}
        assert pairs == set(product(list(VALUES.values())[one], list(VALUES.values())[other]))
    assert mark == decorate(**VALUES)


def test_the_full_run_has_a_product_of_two() -> None:
    mark = each_value(a=range(3), b=range(4))
    assert all(m.name == "full" for row in mark.args[1] for m in row.marks)


def test_some_rows_by_their_ids() -> None:
    mark = some(["one-y"], a={"one": 1, "two": 2}, b=["x", "y"])
    assert default(mark) == [(1, "y")]
    assert [row.id for row in mark.args[1]] == ["one-x", "one-y", "two-x", "two-y"]
    with pytest.raises(AssertionError, match="three"):
        some(["three"], a={"one": 1})
