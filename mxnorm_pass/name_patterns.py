"""Patterns that select modules by name: globs, and regular expressions after "re:"."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass

# Linears of these names, wherever they are, are changed only where `modules` names them.
HEAD_NAMES = frozenset({"lm_head", "output"})
_REGEX_PREFIX = "re:"


@dataclass(frozen=True)
class UnmatchedPattern:
    """A key of ``MXNormConfig.modules`` that matched no module name.

    Attributes:
        pattern: the key, as given.
        nearest: up to three of the names it was tried on, best first; empty only if there
            were no names.
    """

    pattern: str
    nearest: tuple[str, ...]


def check_pattern(label: str, pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(
            f"{label} has the key {pattern!r}, which is not valid: expected a non-empty str, "
            f"a glob or a regular expression after {_REGEX_PREFIX!r}"
        )
    try:
        compile_pattern(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{label} has the key {pattern!r}, which is not valid: expected a regular expression "
            f"after {_REGEX_PREFIX!r}, but it does not compile: {error}"
        ) from error


def compile_pattern(pattern: str) -> re.Pattern[str]:
    if pattern.startswith(_REGEX_PREFIX):
        return re.compile(pattern.removeprefix(_REGEX_PREFIX))
    return re.compile(fnmatch.translate(pattern))


def nearest_names(pattern: str, names: list[str]) -> tuple[str, ...]:
    # A regex's escapes would count against every name.
    text = pattern.removeprefix(_REGEX_PREFIX).replace("\\", "")
    close = difflib.get_close_matches(text, names, n=3)
    return tuple(close or difflib.get_close_matches(text, names, n=1, cutoff=0.0))
