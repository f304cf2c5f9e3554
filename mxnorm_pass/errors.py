"""Errors and warnings of this package that users catch."""

from __future__ import annotations

from torch._dynamo.exc import ShortenTraceback


class InvalidOptionsError(ValueError, ShortenTraceback):
    """A ValueError that torch.compile hands to its caller as it is."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


class VerificationError(AssertionError, ShortenTraceback):
    """What ``options={"verify": True}`` has found to be wrong in a rewritten graph."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


class MXNormWarning(UserWarning):
    """Something that the user should know of a compile that went through."""


class CalibrationWarning(MXNormWarning):
    """An inference model runs on the uncalibrated estimate of the RMS."""


class ChannelError(ValueError):
    """The residual stream of a model cannot be permuted; the model is as it was."""


class ConversionError(RuntimeError):
    """A weight could not be cast; those before it are, and the model runs."""
