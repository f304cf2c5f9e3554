"""A progress bar on a terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from mxnorm_pass.extras import needs_extra


def progress_bar(function: str, total: int) -> AbstractContextManager[Any]:
    """tqdm's bar of so many steps, for a function of this package.

    Raises:
        MissingExtraError: tqdm is not installed.
    """
    with needs_extra("hf", f"mxnorm_pass.{function}"):
        from tqdm.auto import tqdm

    bar: AbstractContextManager[Any] = tqdm(desc=function, total=total, disable=None, leave=False)
    return bar
