"""``python -m mxnorm_pass reasons``."""

from __future__ import annotations

import argparse
from textwrap import TextWrapper

from mxnorm_pass.report.reason import SkipReason

_WRAPPER = TextWrapper(
    width=96, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
)


def run(args: argparse.Namespace) -> None:
    """Print why a norm may be left as it is: every reason with its cause and its cure."""
    print("\n\n".join(map(_text, SkipReason)))


def _text(reason: SkipReason) -> str:
    parts = (("cause", reason.cause), ("cure", reason.cure))
    lines = (_WRAPPER.fill(f"{name}: {text}") for name, text in parts)
    return "\n".join([f"{reason.name}: {reason.value}", *lines])
