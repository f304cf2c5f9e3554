"""Text files -> rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mxnorm_pass.cli.errors import UsageError


def read_rows(
    paths: Sequence[Path],
    tokenize: Callable[[str], Sequence[int]],
    *,
    tokens: int,
    rows: int,
    skip: int = 0,
) -> Tensor:
    """Cut the files' text, one after the other, into rows that do not overlap.

    Args:
        tokenize: the ids of a text.
        skip: rows left out at the start.

    Returns:
        int64 [rows, tokens].

    Raises:
        UsageError: a file cannot be read, or all of them are too short.
    """
    ids = [token for path in paths for token in tokenize(_read(path))]
    first, last = skip * tokens, (skip + rows) * tokens
    if len(ids) < last:
        needed = f"{rows} rows of {tokens}" + (f" after {skip} that are skipped" if skip else "")
        raise UsageError(
            f"--text has {len(ids)} tokens, {needed} need {last}: give more text, or fewer "
            "--tokens or --batches"
        )
    return torch.tensor(ids[first:last], dtype=torch.long).reshape(rows, tokens)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--text {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--text {str(path)!r} is not UTF-8") from None
