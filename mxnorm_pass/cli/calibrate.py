"""``calibrate``: fit the estimate to a checkpoint."""

from __future__ import annotations

import argparse

from mxnorm_pass.cli.checkpoint import library_function, load
from mxnorm_pass.cli.inputs import check_outputs, read_options


def run(args: argparse.Namespace) -> None:
    calibrate = library_function("calibrate")
    check_outputs(out=args.out)
    options = read_options(args.options)
    model, rows = load(args)
    batches = [{"input_ids": row, "labels": row} for row in rows.split(1)]
    budget = args.max_loss_increase
    calibration = calibrate(
        model, batches, options, **({} if budget is None else {"max_loss_increase": budget})
    )
    calibration.save(args.out)
    print(calibration)
