"""What the command line refuses."""

from __future__ import annotations


class UsageError(Exception):
    """Wrong arguments; the message says what was given and what to give instead."""


def reason(error: Exception, limit: int = 300) -> str:
    """The first line of an error's text, which may be long where libraries list what they know."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
