"""What is needed beyond a compile, and which extra of this package brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package is not installed that belongs to one of this package's extras."""


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Around imports: say which extra of this package brings what is not installed.

    Args:
        extra: its name in pyproject.toml.
        what: for which the imports are, for people.

    Raises:
        MissingExtraError: in the place of a ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: pip install 'mxnorm_pass[{extra}]'",
            name=error.name,
        ) from error
