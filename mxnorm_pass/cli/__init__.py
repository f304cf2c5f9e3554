"""The command line: ``python -m mxnorm_pass explain|compare|calibrate|reasons``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mxnorm_pass.cli.errors import UsageError
from mxnorm_pass.cli.parser import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse exits by itself on bad syntax."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    _quiet_imports()
    from mxnorm_pass.extras import MissingExtraError

    try:
        # On demand, so that help and bad syntax do not wait for torch.
        import_module(f"mxnorm_pass.cli.{args.command}").run(args)
        sys.stdout.flush()
    except (UsageError, MissingExtraError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _quiet_imports() -> None:
    """What libraries log at import, of extensions for other chips, says nothing of the model."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
