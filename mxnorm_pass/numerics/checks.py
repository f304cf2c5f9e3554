"""Checks of what functions and ops are given; every error names the argument."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises a ValueError that lists what is allowed."""
    choices = tuple(allowed)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, choices))}")
