"""``calibrate``: fit the estimate to a checkpoint."""

from __future__ import annotations

import argparse

from mxnorm_pass.checkpoints.calibrate.calibrate import calibrate
from mxnorm_pass.cli.checkpoint import load
from mxnorm_pass.cli.errors import UsageError
from mxnorm_pass.cli.inputs import check_outputs, read_options


def run(args: argparse.Namespace) -> None:
    check_outputs(out=args.out)
    options = read_options(args.options)
    model, rows = load(args)
    batches = [{"input_ids": row, "labels": row} for row in rows.split(1)]
    try:
        calibration = calibrate(model, batches, options, args.max_loss_increase)
    except ValueError as error:
        raise UsageError(str(error)) from None
    calibration.save(args.out)
    estimated = len(calibration.weights.keys() - set(calibration.exact))
    print(f"{args.out}: {estimated} norms on block weights, {len(calibration.exact)} exact")
    if calibration.order is not None:
        print("fitted to another channel order: apply mxnorm_pass.permute_channels to the model")
