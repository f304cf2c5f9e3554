"""``explain``: the report of a model that is known by its config alone."""

from __future__ import annotations

import argparse

import torch

from mxnorm_pass.cli.config_model import build, example_inputs, load_config
from mxnorm_pass.cli.inputs import check_outputs, read_options
from mxnorm_pass.cli.progress import progress
from mxnorm_pass.compilation.explain import explain
from mxnorm_pass.files import write_text


def run(args: argparse.Namespace) -> None:
    check_outputs(html=args.html, json=args.json)
    options = read_options(args.options)
    config = load_config(args.model, layers=args.layers, unquantized=args.unquantized)
    model = build(config, args.dtype).train(args.train)
    inputs = example_inputs(model, args.tokens)
    with progress(f"tracing {type(model).__name__}"), torch.set_grad_enabled(args.train):
        report = explain(model, options=options, **inputs)
    if args.json is not None:
        write_text(args.json, report.to_json())
    if args.html is not None:
        report.save_html(args.html)
    print(report)
