"""Names of modules: in one spelling, and the patterns of the option ``modules``."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass
from functools import lru_cache

_VARIABLE = re.compile(r"[LG]\['([^']*)'\]")
_REGISTRY = "(?:_modules|_parameters|_buffers)"
_MODULES_ITEM = re.compile(rf"(?:\.__dict__\['{_REGISTRY}'\]|\.{_REGISTRY})\['([^']+)'\]")
# Wrappers that torch itself leaves out of the names of what they wrap.
_WRAPPER = re.compile(
    r"(?:^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?![^.\[])"
)
_GETATTR = re.compile(r"getattr\((.+?), ['\"]([^'\"]+)['\"]\)")
_ITEM = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")


@lru_cache(maxsize=4096)
def clean_module_path(path: str, keep_variable: bool = False) -> str:
    """``L['self'].model.layers.0.mlp`` and its other spellings -> ``model.layers.0.mlp``.

    Args:
        keep_variable: ``L['policy'].norm`` -> ``policy.norm``; ``self`` is left out all the same.
    """
    while (found := _GETATTR.search(path)) is not None:
        path = f"{path[: found.start()]}{found[1]}.{found[2]}{path[found.end() :]}"
    variable = _VARIABLE.match(path)
    if variable is not None:
        kept = keep_variable and variable[1] not in ("self", "cls")
        path = f"{variable[1] if kept else ''}{path[variable.end() :]}"
    path = _WRAPPER.sub("", _MODULES_ITEM.sub(r".\1", path))
    return _ITEM.sub(r".\1", path).strip(".")


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
