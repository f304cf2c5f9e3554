"""``compare``: what the estimate costs a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from mxnorm_pass.checkpoints.channels.permute import permute_channels
from mxnorm_pass.checkpoints.compare.compare import compare
from mxnorm_pass.cli.checkpoint import load
from mxnorm_pass.cli.errors import UsageError
from mxnorm_pass.cli.inputs import check_outputs, read_options
from mxnorm_pass.files import write_text
from mxnorm_pass.options.parse import parse


def run(args: argparse.Namespace) -> None:
    check_outputs(json=args.json, plot=args.plot)
    options = read_options(args.options)
    model, rows = load(args)
    try:
        _apply_order(model, options)
        comparison = compare(model, {"input_ids": rows, "labels": rows}, options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.json is not None:
        write_text(args.json, comparison.to_json())
    if args.plot is not None:
        comparison.plot(args.plot)
    print(comparison)


def _apply_order(model: nn.Module, options: dict[str, Any]) -> None:
    """A calibration may be for the model with its channels in another order."""
    calibration = parse(options).config.calibration
    if calibration is not None and calibration.order is not None:
        permute_channels(model, calibration.order)
