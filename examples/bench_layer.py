"""Whole Llama-3-8B-shaped layers in MXFP8 (emulated): backend="mxnorm" against "inductor".

    python examples/bench_layer.py
    python examples/bench_layer.py --mode reduce-overhead --tokens 128 1
    python examples/bench_layer.py --hidden 256 --tokens 64 --layers 1 --device cpu

Two models of the same shape: one quantised by torchao for inference (prefill under no_grad, at each
of --tokens), one with torchao's MXFP8 training linears (a step is loss and backward, at the largest
of --tokens). torchao casts every linear but lm_head, so all backends compile the same model, in the
same mode. They take turns, in a new order every round; the table shows medians. A compile starts
from cold caches; its time is that of the first call less that of the second, "pass" is our share.
"error" is the relative distance of the logits from those of the model without torch.compile.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_kernels import positive_int
from benchlib import RESULTS, Timing, interleaved, invocation, machine, save_json
from pass_time import cold_caches, convert_linears, pass_times
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from transformers import LlamaConfig, LlamaForCausalLM

import mxnorm_pass
from mxnorm_pass.compilation.e8m0_on_cpu import cpu_e8m0_support

VOCAB = 1024
HEAD = 128
BASELINE = "inductor"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {"backend": "inductor"},
    "mxnorm": {"backend": "mxnorm", "options": {"estimator": "mxnorm"}},
    "exact": {"backend": "mxnorm", "options": {"estimator": "exact"}},
}


@dataclass(frozen=True)
class Arm:
    """One backend in one scenario.

    Attributes:
        error: relative distance of the logits from the uncompiled model's.
        from_inductor: the same from those of the "inductor" arm.
        fused: norms that the pass rewrote.
    """

    timing: Timing
    compile_seconds: float
    pass_seconds: float
    fused: int
    error: float
    from_inductor: float


@dataclass(frozen=True)
class Scenario:
    work: str  # "prefill" or "training"
    tokens: int
    arms: dict[str, Arm]

    def speed_up(self, name: str) -> float:
        return self.arms[BASELINE].timing.us / self.arms[name].timing.us


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Llama-3-8B-shaped MXFP8 layers, backend mxnorm against inductor."
    )
    number = positive_int
    parser.add_argument("--layers", type=number, default=2)
    parser.add_argument("--hidden", type=number, default=4096, help=f"a multiple of {HEAD}")
    parser.add_argument("--tokens", type=number, nargs="+", default=[8192, 128, 1], metavar="T")
    parser.add_argument(
        "--work", nargs="+", choices=["prefill", "training"], default=["prefill", "training"]
    )
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=[name for name in ARMS if name != BASELINE],
        default=[name for name in ARMS if name != BASELINE],
        help="of backend mxnorm, beside backend inductor",
    )
    parser.add_argument("--rounds", type=number, default=25, help="timed runs of each backend")
    parser.add_argument(
        "--mode", choices=sorted(torch._inductor.list_mode_options()), default="default"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s here"
    )
    parser.add_argument(
        "--no-warm-up", action="store_true", help="the first compile is not measured alone then"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_layer.json")
    args = parser.parse_args(argv)
    if args.hidden % HEAD:
        parser.error(f"--hidden must be a multiple of {HEAD}")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU here")
    return args


def arms_of(args: argparse.Namespace) -> list[str]:
    return [BASELINE, *args.estimators]


def build_model(args: argparse.Namespace, work: str) -> nn.Module:
    """HuggingFace's Llama with the proportions of Llama 3 8B, its linears in torchao's MXFP8."""
    heads = args.hidden // HEAD
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=VOCAB,
        max_position_embeddings=max(args.tokens),
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    if work == "training":
        convert_linears(model)
        return model.train()
    kernels = MXDynamicActivationMXWeightConfig(kernel_preference=KernelPreference.EMULATED)
    quantize_(model, kernels, filter_fn=is_quantized)
    return model.eval()


def is_quantized(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def compiled(model: nn.Module, arm: str, mode: str) -> Callable[..., Any]:
    settings = ARMS[arm]
    # torch.compile takes either a mode or options, and a mode is a name for options.
    options = {**torch._inductor.list_mode_options(mode), **settings.get("options", {})}
    function: Callable[..., Any] = torch.compile(
        model, backend=settings["backend"], options=options or None, dynamic=False
    )
    return function


def call_of(model: Callable[..., Any], ids: Tensor, work: str) -> Callable[[], Tensor]:
    """One prefill, or one step of training without the optimizer's; returns the logits."""

    def prefill() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    def step() -> Tensor:
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        logits: Tensor = output.logits
        return logits.detach()

    return prefill if work == "prefill" else step


def between_runs(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    torch.compiler.cudagraph_mark_step_begin()


@dataclass(frozen=True)
class Compiled:
    call: Callable[[], Tensor]
    logits: Tensor
    seconds: float
    pass_seconds: float
    fused: int


def compile_arm(model: nn.Module, arm: str, ids: Tensor, work: str, mode: str) -> Compiled:
    call = call_of(compiled(model, arm, mode), ids, work)
    # On a CPU the baseline needs the scales' dtype, which our backend brings along.
    support = cpu_e8m0_support()
    with support, cold_caches(), pass_times() as times, mxnorm_pass.record() as report:
        between_runs(model)
        first, _ = timed(call)
        between_runs(model)
        second, logits = timed(call)
    return Compiled(call, logits, first - second, sum(times.seconds), len(report.fused))


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begun = time.perf_counter()
    # A copy: CUDA graphs overwrite what they returned before.
    logits = call().clone()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, logits


def measure(model: nn.Module, work: str, tokens: int, args: argparse.Namespace) -> Scenario:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (1, tokens), generator=generator).to(args.device)
    expected = call_of(model, ids, work)()
    made = {name: compile_arm(model, name, ids, work, args.mode) for name in arms_of(args)}
    runs = {name: own.call for name, own in made.items()}
    options: dict[str, Any] = {"device": args.device, "before": lambda: between_runs(model)}
    interleaved(runs, rounds=3, **options)
    samples = interleaved(runs, rounds=args.rounds, **options)
    between_runs(model)
    arms = {
        name: Arm(
            timing=Timing.of(samples[name]),
            compile_seconds=own.seconds,
            pass_seconds=own.pass_seconds,
            fused=own.fused,
            error=distance(own.logits, expected),
            from_inductor=distance(own.logits, made[BASELINE].logits),
        )
        for name, own in made.items()
    }
    return Scenario(work, tokens, arms)


def distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice to calibrate: the model is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mxnorm_pass.CalibrationWarning)
        yield


def measure_all(args: argparse.Namespace) -> Iterator[Scenario]:
    for work in args.work:
        model = build_model(args, work)
        lengths = args.tokens if work == "prefill" else [max(args.tokens)]
        for tokens in lengths:
            yield measure(model, work, tokens, args)
        del model
        torch._dynamo.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def warm_up(args: argparse.Namespace) -> None:
    """What torch does once per process would land in the first compile."""
    small = argparse.Namespace(**{**vars(args), "hidden": HEAD, "layers": 1, "tokens": [32]})
    for work in args.work:
        model = build_model(small, work)
        for arm in arms_of(args):
            compile_arm(
                model, arm, torch.zeros(1, 32, dtype=int, device=args.device), work, "default"
            )


def table(scenarios: list[Scenario], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    for column in (
        "work", "T", "backend", "ms", "10%", "90%", "speed-up", "compile s", "pass s",
        "fused", "error", "from inductor",
    ):  # fmt: skip
        shown.add_column(column, justify="right")
    for scenario in scenarios:
        for name, arm in scenario.arms.items():
            times = (arm.timing.us, arm.timing.low, arm.timing.high)
            shown.add_row(
                scenario.work,
                str(scenario.tokens),
                name,
                *(f"{us / 1e3:.3f}" for us in times),
                f"{scenario.speed_up(name):.3f}x",
                f"{arm.compile_seconds:.1f}",
                f"{arm.pass_seconds:.2f}" if name != BASELINE else "",
                str(arm.fused) if name != BASELINE else "",
                f"{arm.error:.1e}",
                f"{arm.from_inductor:.1e}" if name != BASELINE else "",
            )
    return shown


def verdicts(scenarios: list[Scenario]) -> list[str]:
    """Prefill no slower than Inductor, beyond the spread; "exact" as true to the model as it."""
    lines = []
    for scenario in scenarios:
        where, arms = f"{scenario.work} T = {scenario.tokens}", scenario.arms
        base = arms[BASELINE]
        if "mxnorm" in arms:
            slower = arms["mxnorm"].timing.low > base.timing.high
            speed = f"{scenario.speed_up('mxnorm'):.3f}x"
            claim = f"mxnorm no slower than inductor beyond the spread: {speed}"
            lines.append(f"{'FAIL' if slower else 'PASS'} {where}: {claim}")
        if "exact" in arms:
            # Both err by how they round, independently: half as far again is no longer the same.
            right = arms["exact"].error <= 1.5 * base.error
            errors = f"{arms['exact'].error:.1e} against {base.error:.1e}"
            claim = f"exact as near the uncompiled model as inductor: {errors}"
            lines.append(f"{'PASS' if right else 'FAIL'} {where}: {claim}")
    return lines


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    results: dict[str, Any] = {"machine": machine(), **invocation(), "mode": args.mode}
    results |= {"layers": args.layers, "hidden": args.hidden, "scenarios": []}
    scenarios: list[Scenario] = []
    with quiet():
        if not args.no_warm_up:
            warm_up(args)
        for scenario in measure_all(args):
            scenarios.append(scenario)
            save_json(args.json, {**results, "scenarios": [asdict(s) for s in scenarios]})
            speeds = " ".join(f"{name} {scenario.speed_up(name):.3f}x" for name in args.estimators)
            print(f"{scenario.work} T = {scenario.tokens}: {speeds}", flush=True)
    title = f"{args.layers} layers of {args.hidden}, mode {args.mode}, torch {torch.__version__}"
    Console(width=None if sys.stdout.isatty() else 130).print(table(scenarios, title))
    print("\n".join(verdicts(scenarios)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
