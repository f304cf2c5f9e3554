"""A progress bar on a terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from mxnorm_pass.extras import needs_extra


def progress_bar(function: str, total: int, shown: bool = True) -> AbstractContextManager[Any]:
    """tqdm's bar of so many steps, for a function of this package.

    Args:
        shown: where there is a terminal; False: nowhere.

    Raises:
        MissingExtraError: tqdm is not installed.
    """
    with needs_extra("hf", f"mxnorm_pass.{function}"):
        from tqdm.auto import tqdm

    # None: where there is no terminal.
    disable = None if shown else True
    bar: AbstractContextManager[Any] = tqdm(
        desc=function, total=total, disable=disable, leave=False
    )
    return bar
