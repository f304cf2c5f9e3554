"""What ``bench_recipes.py`` measures of training: forward and backward of Llama-3-8B's layers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_layer import distance, quiet
from bench_recipe_kernels import recipe_option
from benchlib import Timing, interleaved
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import mxnorm_pass  # noqa: F401  registers the backend

LLAMA = Path(__file__).parent / "configs" / "llama-3-8b.json"
BASELINE = "bf16"
# The layers' matmuls by themselves, which are the same in every step.
MATMULS = "matmuls"
# No recipe: the forward's casts alone.
FORWARD = "none"
RECIPES = (MATMULS, FORWARD, "mxfp8", "mxfp4", "mxfp4-rht-sr", "nvfp4")
# All arms are compiled from one code object.
COMPILES = 64


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
class Operands:
    """Of a linear's three matmuls: x [T, K], weight [N, K], gradient [T, N]."""

    x: Tensor
    weight: Tensor
    gradient: Tensor

    @classmethod
    def random(cls, linear: nn.Linear, rows: int) -> Operands:
        # Of zeros a GPU draws less power and runs faster.
        weight = linear.weight.detach()
        x, gradient = (
            torch.randn(rows, n, device=weight.device).to(weight) for n in weight.shape[::-1]
        )
        return cls(x, weight, gradient)

    def multiply(self) -> Tensor:
        results = (
            self.x @ self.weight.t(), self.gradient @ self.weight, self.gradient.t() @ self.x
        )  # fmt: skip
        return torch.stack([result[0, 0] for result in results]).sum()


@dataclass(frozen=True)
class Matmuls:
    """Those of a step's linears and nothing else."""

    linears: Sequence[Operands]

    def __call__(self) -> Tensor:
        return torch.stack([linear.multiply() for linear in self.linears]).sum()


@dataclass(frozen=True)
class Measured:
    """A recipe, or bf16.

    Attributes:
        bf16: in the same rounds.
        peak_bytes: of memory in a step, that of weights and their gradients included.
        compile_seconds: with the caches as they are, which other processes may have filled.
        error: relative distance of the last hidden state from bf16's; None of matmuls alone.
    """

    recipe: str
    time: Timing
    bf16: Timing
    peak_bytes: int
    compile_seconds: float
    error: float | None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        times = {name: Timing(**entry[name]) for name in ("time", "bf16")}
        return cls(**{**entry, **times})

    @property
    def factor(self) -> float:
        return self.time.us / self.bf16.us

    def __str__(self) -> str:
        made = f"{self.time.us / 1e3:.2f} ms, {self.factor:.2f}x"
        error = "" if self.error is None else f", error {self.error:.1e}"
        return f"step {self.recipe}: {made}; compiled in {self.compile_seconds:.0f} s{error}"


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

    def arm(self, recipe: str) -> Step | Matmuls:
        """What is timed under a name."""
        if recipe != MATMULS:
            return self.baseline if recipe == BASELINE else self.compiled(recipe)
        linears = (m for m in self.layers.modules() if isinstance(m, nn.Linear))
        rows = self.sizes.batch * self.sizes.tokens
        return Matmuls([Operands.random(linear, rows) for linear in linears])

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

    def seconds(self, step: Callable[[], Tensor]) -> float:
        self.forget_gradients()
        begun = time.perf_counter()
        step()
        if self.sizes.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    @torch._dynamo.config.patch(recompile_limit=COMPILES)
    @quiet()
    def measure(self, recipe: str, rounds: int) -> Measured:
        step = self.arm(recipe)
        first, second = self.seconds(step), self.seconds(step)
        runs = {BASELINE: self.baseline, recipe: step}
        options: dict[str, Any] = {
            "device": self.sizes.device, "before": self.forget_gradients
        }  # fmt: skip
        interleaved(runs, rounds=2, **options)
        samples = interleaved(runs, rounds=rounds, **options)
        return Measured(
            recipe=recipe,
            time=Timing.of(samples[recipe]),
            bf16=Timing.of(samples[BASELINE]),
            peak_bytes=self.peak_bytes(step),
            compile_seconds=first - second,
            error=None if recipe == MATMULS else distance(step(), self.baseline()),
        )

    @quiet()
    def compile_once(self, recipe: str) -> None:
        self.arm(recipe)()

    def peak_bytes(self, step: Callable[[], Tensor]) -> int:
        if self.sizes.device != "cuda":
            return 0
        self.forget_gradients()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()


def table(measured: Sequence[Measured]) -> list[str]:
    """Milliseconds as Markdown.

    "casts": what a step takes beyond that in bf16, whose matmuls it shares.
    """
    if not measured:
        return []
    columns = ("", "ms", "over bf16", "casts", "peak GiB", "error")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for m in measured:
        cells = [f"{m.time.us / 1e3:.2f}", f"{m.factor:.2f}x"]
        is_recipe = m.recipe not in (BASELINE, MATMULS)
        cells.append(f"{(m.time.us - m.bf16.us) / 1e3:.2f}" if is_recipe else "")
        cells.append(f"{m.peak_bytes / 2**30:.1f}")
        cells.append(f"{m.error:.1e}" if m.error else "")
        lines.append(f"| {m.recipe} | {' | '.join(cells)} |")
    return lines
