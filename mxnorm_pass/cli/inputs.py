"""Options and output paths, checked before anything slow begins."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from mxnorm_pass.cli.errors import UsageError
from mxnorm_pass.options.parse import parse


def read_options(given: str) -> dict[str, Any]:
    """Options for ``torch.compile`` from a JSON object, or from the file named after "@".

    Raises:
        UsageError: no JSON object, an unknown option or a wrong value.
    """
    try:
        text = Path(given[1:]).read_text("utf-8") if given.startswith("@") else given
        options = json.loads(text, object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UsageError(f"--options: cannot read {given[1:]!r}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--options {given!r} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise UsageError(f'--options {given!r} is not a JSON object, such as {{"p": 1}}')
    with_dtypes = {name: _with_dtypes(name, value) for name, value in options.items()}
    try:
        parse(with_dtypes)
    except ValueError as error:
        raise UsageError(f"--options: {error}") from None
    return with_dtypes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, value in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _with_dtypes(name: str, value: Any) -> Any:
    """An option's value with dtypes in the place of their names, overrides per module included."""
    if isinstance(value, dict):
        return {inner: _with_dtypes(inner, v) for inner, v in value.items()}
    if name != "elem_dtype" or not isinstance(value, str):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else value


def check_outputs(**paths: Path | None) -> None:
    """Refuse paths that cannot be written, by the name of their argument.

    Raises:
        UsageError: a folder is missing or read-only, two paths are the same, or something other
            than a file is there already.
    """
    taken: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise UsageError(f"--{name} {str(path)!r} is there and is no file")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            problem = f"cannot write into {str(path.parent)!r}: {error.strerror}"
            raise UsageError(f"--{name} {str(path)!r}: {problem}") from None
        other = taken.setdefault(path.resolve(), name)
        if other != name:
            raise UsageError(f"--{other} and --{name} name the same file, {str(path)!r}")
