"""Reports as JSON."""

from __future__ import annotations

from dataclasses import is_dataclass
from enum import Enum
from typing import Any


def json_value(value: Any) -> Any:
    """For ``json.dumps(default=...)``: a data class is its fields, an enum's member its name.

    Unlike ``asdict`` it copies nothing: a report of a large model has some ten thousand nodes.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return vars(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
