"""What ``bench_recipes.py`` measures of training: forward and backward of Llama-3-8B's layers."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_layer import distance, quiet
from bench_recipe_kernels import recipe_option
from benchlib import Timing, interleaved
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaModel

import mxnorm_pass  # noqa: F401  registers the backend

LLAMA = Path(__file__).parent / "configs" / "llama-3-8b.json"
BASELINE = "bf16"
# No recipe: the forward's casts alone.
FORWARD = "none"
RECIPES = (FORWARD, "mxfp8", "mxfp4", "mxfp4-rht-sr", "nvfp4")
# All arms are compiled from one code object.
COMPILES = 64
KERNELS_KEPT = 40
NAME_LENGTH = 160

# What a kernel is, by its name; the first that is found counts. Inductor's kernels are named after
# the ops that it fused, but for templates, which are matmuls.
KINDS = {
    "rest": r"^triton_(?!tem_)",
    "casts": r"^(operand_|norm_cast)",
    "attention": r"flash|fmha|sdpa|attention",
    "matmul": r"gemm|nvjet|cutlass|(?<!ga)mma|splitk|^triton_tem_|^mx_linear",
}


def kind_of(kernel: str) -> str:
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "rest")


@dataclass(frozen=True)
class Sizes:
    """What is trained.

    Attributes:
        config: of Llama-3-8B's, what is different here. The head is left out, and no embeddings
            are looked up.
    """

    config: Mapping[str, Any] = field(
        default_factory=lambda: {"num_hidden_layers": 2, "vocab_size": 32}
    )
    batch: int = 4
    tokens: int = 2048
    device: str = "cuda"


@dataclass(frozen=True)
class Step:
    """Forward and backward, without an optimizer."""

    model: Callable[..., Any]
    x: Tensor
    gradient: Tensor

    def __call__(self) -> Tensor:
        y: Tensor = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        y.backward(self.gradient)
        return y.detach()


@dataclass(frozen=True)
class Kernel:
    name: str
    calls: int
    us: float


@dataclass(frozen=True)
class Measured:
    """A recipe, or bf16.

    Attributes:
        bf16: in the same rounds.
        peak_bytes: of memory in a step, that of weights and their gradients included.
        compile_seconds: with the caches as they are, which other processes may have filled.
        error: relative distance of the last hidden state from bf16's.
        kinds: microseconds of a step by kind of kernel.
        kernels: of a step, those that take the most time.
    """

    recipe: str
    time: Timing
    bf16: Timing
    peak_bytes: int
    compile_seconds: float
    error: float
    kinds: dict[str, float]
    kernels: list[Kernel]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        times = {name: Timing(**entry[name]) for name in ("time", "bf16")}
        return cls(**{**entry, **times, "kernels": [Kernel(**k) for k in entry["kernels"]]})

    @property
    def factor(self) -> float:
        return self.time.us / self.bf16.us

    def __str__(self) -> str:
        made = f"compiled in {self.compile_seconds:.0f} s, error {self.error:.1e}"
        return f"step {self.recipe}: {self.time.us / 1e3:.2f} ms, {self.factor:.2f}x; {made}"


def backend_options(recipe: str) -> dict[str, Any]:
    return {"quantize": "all"} | ({} if recipe == FORWARD else {"recipe": recipe_option(recipe)})


@dataclass(frozen=True)
class Steps:
    """Layers of one model, compiled in several ways."""

    sizes: Sizes = Sizes()

    @cached_property
    def layers(self) -> LlamaModel:
        values = {**json.loads(LLAMA.read_text()), **self.sizes.config}
        torch.manual_seed(0)
        with torch.device(self.sizes.device):
            model: Any = LlamaModel(LlamaConfig.from_dict(values))
        return model.to(torch.bfloat16).train()  # type: ignore[no-any-return]

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the layers read, and the gradient of what they make."""
        width = self.layers.config.hidden_size
        shape = (2, self.sizes.batch, self.sizes.tokens, width)
        x, gradient = torch.randn(shape, device=self.sizes.device, dtype=torch.bfloat16)
        # In the midst of a model the layers' input has a gradient.
        return x.clone().requires_grad_(), gradient

    def compiled(self, recipe: str) -> Step:
        options: dict[str, Any] = {"dynamic": False}
        if recipe != BASELINE:
            options |= {"backend": "mxnorm", "options": backend_options(recipe)}
        return Step(torch.compile(self.layers, **options), *self.inputs)

    @cached_property
    def baseline(self) -> Step:
        return self.compiled(BASELINE)

    def forget_gradients(self) -> None:
        self.layers.zero_grad(set_to_none=True)
        self.inputs[0].grad = None

    def seconds(self, step: Step) -> float:
        self.forget_gradients()
        begun = time.perf_counter()
        step()
        if self.sizes.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    @torch._dynamo.config.patch(recompile_limit=COMPILES)
    @quiet()
    def measure(self, recipe: str, rounds: int) -> Measured:
        step = self.baseline if recipe == BASELINE else self.compiled(recipe)
        first, second = self.seconds(step), self.seconds(step)
        runs = {BASELINE: self.baseline, recipe: step}
        options: dict[str, Any] = {
            "device": self.sizes.device, "before": self.forget_gradients
        }  # fmt: skip
        interleaved(runs, rounds=2, **options)
        samples = interleaved(runs, rounds=rounds, **options)
        kernels = self.kernels(step)
        return Measured(
            recipe=recipe,
            time=Timing.of(samples[recipe]),
            bf16=Timing.of(samples[BASELINE]),
            peak_bytes=self.peak_bytes(step),
            compile_seconds=first - second,
            error=distance(step(), self.baseline()),
            kinds=time_by_kind(kernels),
            kernels=kernels[:KERNELS_KEPT],
        )

    @quiet()
    def compile_once(self, recipe: str) -> None:
        self.compiled(recipe)()

    def peak_bytes(self, step: Step) -> int:
        if self.sizes.device != "cuda":
            return 0
        self.forget_gradients()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()

    def kernels(self, step: Step) -> list[Kernel]:
        """What a GPU runs in a step, that which takes most time first."""
        if self.sizes.device != "cuda":
            return []
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.seconds(step)
        us: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in profiled.events() or ():
            # Annotations span kernels that are counted for themselves.
            if event.device_type is DeviceType.CUDA and not event.is_user_annotation:
                us[event.name] += event.time_range.elapsed_us()
                calls[event.name] += 1
        return [Kernel(name[:NAME_LENGTH], calls[name], t) for name, t in us.most_common()]


def time_by_kind(kernels: Sequence[Kernel]) -> dict[str, float]:
    times = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        times[kind_of(kernel.name)] += kernel.us
    return times


def table(measured: Sequence[Measured]) -> list[str]:
    """Milliseconds as Markdown.

    "emulation": casts and the rest less the rest of bf16, which has the same matmuls.
    """
    if not measured:
        return []
    kinds = ("matmul", "attention", "casts", "rest")
    columns = ("recipe", "ms", "over bf16", "peak GiB", *kinds, "emulation")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    rest = next((m.kinds["rest"] for m in measured if m.recipe == BASELINE), None)
    for m in measured:
        cells = [f"{m.time.us / 1e3:.2f}", f"{m.factor:.2f}x", f"{m.peak_bytes / 2**30:.1f}"]
        cells += [f"{m.kinds[kind] / 1e3:.2f}" for kind in kinds]
        emulated = None if rest is None else m.kinds["casts"] + m.kinds["rest"] - rest
        cells.append("" if emulated is None else f"{emulated / 1e3:.2f}")
        lines.append(f"| {m.recipe} | {' | '.join(cells)} |")
    return lines
