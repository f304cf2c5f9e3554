"""Errors and warnings of this package that users catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import ShortenTraceback


class InvalidOptionsError(ValueError, ShortenTraceback):
    """A ValueError that torch.compile hands to its caller as it is."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


class VerificationError(AssertionError, ShortenTraceback):
    """What ``options={"verify": True}`` has found to be wrong in a rewritten graph."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


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


class MXNormWarning(UserWarning):
    """Something that the user should know of a compile that went through."""


class CalibrationWarning(MXNormWarning):
    """An inference model runs on the uncalibrated estimate of the RMS."""


class ChannelError(ValueError):
    """The residual stream of a model cannot be permuted; the model is as it was."""
