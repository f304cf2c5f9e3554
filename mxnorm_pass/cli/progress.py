"""A sign of life on a terminal."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def progress(what: str) -> AbstractContextManager[Any]:
    """Show what takes its time while inside; nothing without a terminal or without rich."""
    if not sys.stderr.isatty():
        return nullcontext()
    try:
        from rich.console import Console
    except ImportError:
        return nullcontext()
    return Console(stderr=True).status(what)
