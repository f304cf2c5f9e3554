"""Errors that reach the caller of a compiled model as they are."""

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
