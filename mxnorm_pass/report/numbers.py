"""Numbers of layers as text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def number_set(numbers: Iterable[int]) -> str:
    """Distinct numbers as text, runs of three and more shortened: ``0, 5..9``."""
    parts = []
    for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        values = [number for _, number in run]
        if len(values) > 2:
            parts.append(f"{values[0]}..{values[-1]}")
        else:
            parts += map(str, values)
    return ", ".join(parts)
