"""Checks of what the functions of this package are given; every error names the argument."""

from __future__ import annotations


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
