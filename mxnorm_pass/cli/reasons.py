"""``reasons``: what each reason for a skip means, and what to do."""

from __future__ import annotations

import argparse
from textwrap import fill

from mxnorm_pass.cli.errors import UsageError
from mxnorm_pass.report.reason import SkipReason

_WIDTH = 100


def run(args: argparse.Namespace) -> None:
    known = {reason.name: reason for reason in SkipReason}
    for name in args.reason:
        if name not in known:
            raise UsageError(f"{name!r} is no reason; the reasons are {', '.join(known)}")
    print("\n\n".join(_text(known[name]) for name in args.reason or known))


def _text(reason: SkipReason) -> str:
    return "\n".join(
        [
            f"{reason.name}: {reason.value}",
            *(_line("cause", reason.cause), _line("cure", reason.cure)),
        ]
    )


def _line(title: str, text: str) -> str:
    indent = "  "
    first = f"{indent}{title + ':':<7}"
    rest = " " * len(first)
    return fill(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
