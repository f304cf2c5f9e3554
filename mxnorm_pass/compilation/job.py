"""One call of the backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def foreign_subclass(values: Iterable[Any]) -> str | None:
    """Name of a tensor subclass among the values, torchao's aside."""
    for value in values:
        if is_traceable_wrapper_subclass(value):
            kind = type(value)
            if kind.__module__.split(".")[0] != "torchao":
                return kind.__name__
    return None
