"""MXNorm in a Llama: what gets fused, how far the logits move, how long a call takes, the loss.

    python examples/llama.py
    python examples/llama.py --train 200
    python examples/llama.py --model path/to/checkpoint --inner aot_eager

The first line needs no download: the model is a small Llama with random weights. Two arms are
compared, backend="mxnorm" with the estimated RMS and with estimator="exact", which keeps RMSNorm
and casts the same linears to MXFP8, so that their difference is the estimate alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils import benchmark
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mxnorm_pass

SEED = 0
MX_BLOCK = 32
TIMING_ROUNDS = 15
CALLS_PER_ROUND = 2
PHRASE = 16
ALPHABET = 32
BASELINE = "exact RMSNorm + MXFP8 casts (estimator='exact')"

Options = dict[str, Any]


class BadInput(Exception):
    """The command line asks for something that cannot be done."""


@dataclass(frozen=True)
class Arm:
    """One way to run the model.

    Attributes:
        call: runs the compiled model and returns its logits.
        logits: of the first call.
        report: what the pass did at the arm's compile.
    """

    call: Callable[[], Tensor]
    logits: Tensor
    report: mxnorm_pass.Report


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="MXNorm in a Llama: report, error, time and, with --train, the loss."
    )
    parser.add_argument("--model", help="checkpoint folder or hub name instead of random weights")
    parser.add_argument("--layers", type=positive_int, default=4, help="without --model")
    parser.add_argument(
        "--hidden", type=positive_int, default=256, help="without --model; a multiple of 32"
    )
    parser.add_argument("--batch", type=positive_int, default=2)
    parser.add_argument("--tokens", type=positive_int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s here"
    )
    parser.add_argument("--inner", choices=["inductor", "aot_eager", "eager"], default="inductor")
    parser.add_argument("--p", type=float, default=2.0, help="exponent of the RMS estimate")
    parser.add_argument("--gain", choices=["auto", "fold", "activation"], default="auto")
    parser.add_argument("--gradient", choices=["true", "orthogonal", "paper"], default="true")
    parser.add_argument(
        "--train",
        type=positive_int,
        metavar="N",
        help="then train both arms for N steps on a synthetic copy task",
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW in --train")
    return parser.parse_args(argv)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def check(args: argparse.Namespace) -> None:
    """Refuse what would otherwise fail only after the first compile."""
    try:
        mxnorm_pass.MXNormConfig(**mxnorm_options(args))
    except ValueError as error:
        raise BadInput(str(error)) from None
    if args.train and args.tokens <= PHRASE:
        raise BadInput(f"--train needs more than {PHRASE} --tokens, the length of a phrase")


def mxnorm_options(args: argparse.Namespace) -> Options:
    return {"p": args.p, "gain": args.gain, "gradient": args.gradient, "inner": args.inner}


def exact_options(args: argparse.Namespace) -> Options:
    return {"estimator": "exact", "inner": args.inner}


def load_model(args: argparse.Namespace) -> nn.Module:
    model = load_checkpoint(args) if args.model else small_llama(args.layers, args.hidden, args)
    return model.to(args.device).eval()


def load_checkpoint(args: argparse.Namespace) -> nn.Module:
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, args.dtype)
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if looks_like_path(args.model) and not Path(args.model).exists():
            reason = "no such folder"
        raise BadInput(f"cannot load {args.model!r}: {reason}") from None
    return model


def looks_like_path(name: str) -> bool:
    """A hub name is "name" or "owner/name"."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def small_llama(layers: int, hidden: int, args: argparse.Namespace) -> nn.Module:
    if hidden % MX_BLOCK:
        raise BadInput(f"--hidden {hidden} is not a multiple of the MX block size {MX_BLOCK}")
    heads = hidden // MX_BLOCK
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=-(-hidden * 11 // 4 // MX_BLOCK) * MX_BLOCK,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        vocab_size=1024,
        max_position_embeddings=args.tokens,
    )
    torch.manual_seed(SEED)
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(getattr(torch, args.dtype))


def vocabulary(model: nn.Module) -> int:
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return size


def random_ids(model: nn.Module, args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    shape = (args.batch, args.tokens)
    return torch.randint(vocabulary(model), shape, generator=generator).to(args.device)


def run_arm(model: nn.Module, ids: Tensor, options: Options) -> Arm:
    compiled = torch.compile(model, backend="mxnorm", options=options)

    def call() -> Tensor:
        logits: Tensor = compiled(input_ids=ids, use_cache=False).logits
        return logits

    with torch.no_grad(), mxnorm_pass.record() as report:
        logits = call()
    return Arm(call, logits, report)


def time_arms(arms: list[Arm]) -> list[benchmark.Measurement]:
    """Time the arms in turn, so that what else the machine does falls on all of them."""
    timers = [
        benchmark.Timer("call()", globals={"call": arm.call}, num_threads=torch.get_num_threads())
        for arm in arms
    ]
    runs: list[list[benchmark.Measurement]] = [[] for _ in arms]
    with torch.no_grad():
        for _ in range(TIMING_ROUNDS):
            for timer, own in zip(timers, runs, strict=True):
                own.append(timer.timeit(CALLS_PER_ROUND))
    return [benchmark.Measurement.merge(own)[0] for own in runs]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def compare_inference(model: nn.Module, args: argparse.Namespace) -> None:
    ids = random_ids(model, args)
    with torch.no_grad():
        unquantised = model(input_ids=ids, use_cache=False).logits
    mxnorm = run_arm(model, ids, mxnorm_options(args))
    exact = run_arm(model, ids, exact_options(args))
    print(mxnorm.report)
    print()
    print(f"baseline: {BASELINE}")
    print(
        "relative error of the logits (L2)\n"
        f"  mxnorm against the baseline                     "
        f"{relative_error(mxnorm.logits, exact.logits):.4f}\n"
        f"  the baseline against the unquantised model      "
        f"{relative_error(exact.logits, unquantised):.4f}\n"
        f"  mxnorm against the unquantised model            "
        f"{relative_error(mxnorm.logits, unquantised):.4f}"
    )
    print(f"time of a call, {args.device}, inner={args.inner!r}, {TIMING_ROUNDS} rounds")
    for name, time in zip(("mxnorm", "baseline"), time_arms([mxnorm, exact]), strict=True):
        print(
            f"  {name:9} median {time.median * 1e3:.3f} ms, fastest {min(time.times) * 1e3:.3f} ms"
        )
    if args.device == "cpu":
        print("  a CPU emulates the MX casts: these times say nothing about a GPU's")
    if args.model:
        print(
            "this checkpoint runs on an uncalibrated estimate; the first error is what that "
            "costs. For a model trained with RMSNorm use options={'estimator': 'exact'}"
        )


def copy_batch(vocab: int, args: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """Random phrases, each repeated to the row's end; the first round is not to be predicted.

    Few of the vocabulary's tokens occur, so that some hundred steps lower the loss.
    """
    generator = torch.Generator().manual_seed(SEED + 1 + step)
    alphabet = min(vocab, ALPHABET)
    phrase = torch.randint(alphabet, (args.batch, PHRASE), generator=generator)
    ids = phrase.repeat(1, -(-args.tokens // PHRASE))[:, : args.tokens]
    labels = ids.clone()
    labels[:, :PHRASE] = -100
    return ids.to(args.device), labels.to(args.device)


def train_arm(
    model: nn.Module, options: Options, args: argparse.Namespace, advance: Callable[[float], None]
) -> tuple[list[float], mxnorm_pass.Report]:
    """Train a copy of the model; returns the loss of every step."""
    # AdamW's small steps would be rounded away in bf16 parameters.
    trained = copy.deepcopy(model).float().train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr)
    torch._dynamo.reset()
    compiled = torch.compile(trained, backend="mxnorm", options=options)
    autocast = torch.autocast(
        torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"
    )
    losses = []
    with mxnorm_pass.record() as report:
        for step in range(args.train):
            ids, labels = copy_batch(vocabulary(model), args, step)
            with autocast:
                loss = compiled(input_ids=ids, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            advance(losses[-1])
    return losses, report


def compare_training(model: nn.Module, args: argparse.Namespace) -> None:
    arms = {"mxnorm": mxnorm_options(args), "exact": exact_options(args)}
    results = {}
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, options in arms.items():
            bar = progress.add_task(name, total=args.train, loss=float("nan"))

            def advance(loss: float, bar: Any = bar) -> None:
                progress.update(bar, advance=1, loss=loss)

            results[name] = train_arm(model, options, args, advance)
    last = min(args.train, 10)
    print(
        f"\ntraining: {args.train} steps of AdamW, lr {args.lr:g}, fp32 parameters, "
        f"{args.dtype} compute; data and initial weights are the same for both arms"
    )
    print(f"loss: first step, mean of the last {last}")
    for name, (losses, report) in results.items():
        print(
            f"  {name:7} {losses[0]:.4f} {sum(losses[-last:]) / last:.4f}  "
            f"({len(report.fused)} norms fused, {len(report.skipped)} skipped)"
        )


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if not args.model:
        # The warning is about checkpoints trained with RMSNorm; random weights are none.
        warnings.simplefilter("ignore", mxnorm_pass.CalibrationWarning)
    try:
        check(args)
        model = load_model(args)
        compare_inference(model, args)
        if args.train:
            compare_training(model, args)
    except BadInput as error:
        print(f"llama.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
