"""``python -m mxnorm_pass reasons``."""

from __future__ import annotations

import argparse
from textwrap import fill

from mxnorm_pass.report.reason import SkipReason

_WIDTH = 96


def run(args: argparse.Namespace) -> None:
    """Print why a norm may be left as it is: every reason with its cause and its cure."""
    print("\n\n".join(map(_text, SkipReason)))


def _text(reason: SkipReason) -> str:
    parts = (("cause", reason.cause), ("cure", reason.cure))
    indents = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False}
    lines = (fill(f"{name}: {text}", _WIDTH, **indents) for name, text in parts)
    return "\n".join([f"{reason.name}: {reason.value}", *lines])
