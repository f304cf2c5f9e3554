"""``compare``: what the estimate costs a checkpoint."""

from __future__ import annotations

import argparse

from mxnorm_pass.cli.checkpoint import library_function, load
from mxnorm_pass.cli.inputs import check_outputs, read_options
from mxnorm_pass.files import write_text


def run(args: argparse.Namespace) -> None:
    compare = library_function("compare")
    check_outputs(json=args.json, plot=args.plot)
    options = read_options(args.options)
    model, rows = load(args)
    comparison = compare(model, {"input_ids": rows, "labels": rows}, options)
    if args.json is not None:
        write_text(args.json, comparison.to_json())
    if args.plot is not None:
        comparison.plot(args.plot)
    print(comparison)
