"""Inductor's options: its modes, its keys and what they take.

``torch._inductor.config`` is read only when an option has to be looked up there.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Iterable
from typing import Any, Literal, Union, get_args, get_origin

# Enough for an own field to win a near-tie against one of Inductor's ~600 keys, and no more.
_OWN_FIELD_BONUS = 0.1


def invalid(label: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{label}={value!r} is not valid: expected {allowed}")


def one_of(values: Iterable[object]) -> str:
    return "one of " + ", ".join(map(str, values))


def mode_options(mode: object) -> dict[str, Any]:
    """Inductor's options for a ``mode`` of ``torch.compile``."""
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if not isinstance(mode, str) or mode not in modes:
        raise invalid("mode", mode, one_of(map(repr, modes)) + ", or None")
    return dict(modes[mode])


def _inductor_keys() -> list[str]:
    from torch._inductor import config

    return list(config.get_config_copy())


def inductor_key(key: object, own_fields: Collection[str]) -> str:
    """Inductor's spelling of an option that is none of ours.

    Raises:
        ValueError: Inductor has no such key; the message names the nearest valid one.
    """
    keys = _inductor_keys()
    if isinstance(key, str):
        attribute = key.replace("-", "_")
        if attribute in keys:
            return attribute
    nearest = _nearest_option(str(key), own_fields, keys)
    raise ValueError(
        f"options has the key {key!r}, which is neither a field of MXNormConfig nor an Inductor "
        f"config key; the nearest valid one is {nearest!r} "
        f"(fields of MXNormConfig: {', '.join(own_fields)})"
    )


def _nearest_option(key: str, own_fields: Collection[str], inductor_keys: Iterable[str]) -> str:
    matcher = difflib.SequenceMatcher(b=key.lower().replace("-", "_"))

    def similarity(candidate: str) -> float:
        matcher.set_seq1(candidate)
        return matcher.ratio() + (_OWN_FIELD_BONUS if candidate in own_fields else 0.0)

    return max([*own_fields, *inductor_keys], key=similarity)


def check_inductor_value(given_key: str, key: str, value: object) -> None:
    """Raise a ValueError if Inductor's key takes no value of that type."""
    from torch._inductor import config

    expected = _checkable_types(config.get_type(key))  # type: ignore[attr-defined]
    if not expected or isinstance(value, expected):
        return
    if float in expected and isinstance(value, int) and not isinstance(value, bool):
        return
    names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in expected)
    got = type(value).__name__
    raise invalid(f"options[{given_key!r}]", value, f"{names} for this Inductor key, not {got}")


def _checkable_types(declared: Any) -> tuple[type, ...]:
    """Return the classes an Inductor value may have; () where that cannot be told."""
    members: tuple[Any, ...] = (declared,)
    if get_origin(declared) in (Union, types.UnionType):
        members = get_args(declared)
    elif get_origin(declared) is Literal:
        members = tuple(dict.fromkeys(type(value) for value in get_args(declared)))
    # Inductor infers NoneType for a key that has no annotation and defaults to None; such a key
    # takes other values too.
    if members == (types.NoneType,):
        return ()
    known = (bool, int, float, str, list, tuple, types.NoneType)
    return members if all(member in known for member in members) else ()
