"""What a pre-training run is: its sizes, its settings, and the backend options that they mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpointlib import BadInput
from transformers import LlamaConfig

from mxnorm_pass import functional
from mxnorm_pass.backend import mxnorm

# An arm without any casts, and one whose forward alone is cast, to MXFP8.
NO_CASTS, FORWARD_ONLY = "bf16", "none"
NORMS = {"rmsnorm": "exact", "mxnorm": "mxnorm"}
GRADIENTS = ("true", "orthogonal", "paper")
INNERS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Size:
    """A Llama, and what it is trained with unless the command line says otherwise."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    sequence: int = 512
    batch: int = 128
    steps: int = 700
    lr: float = 2e-3
    held_out_rows: int = 512

    def config(self, vocab_size: int, sequence: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=vocab_size,
            tie_word_embeddings=True,
            max_position_embeddings=sequence,
        )


SIZES = {
    "nano": Size(256, 704, 4, 4, sequence=128, batch=8, steps=100, held_out_rows=64),
    "30m": Size(512, 1408, 8, 8),
    "125m": Size(768, 2048, 12, 12, lr=1e-3),
    "wide": Size(2048, 5632, 4, 16, lr=6e-4),
}


@dataclass(frozen=True)
class Run:
    """All that decides a run's losses, beside its text.

    Attributes:
        norm: "rmsnorm" or "mxnorm".
        recipe: of the casts: "bf16", "none", a name of ``functional.RECIPES``, or JSON of a dict.
        forward: format of the forward, in the place of the recipe's own.
        lr: the highest learning rate, after ``warmup`` steps; it ends at a tenth, by a cosine.
        batch: rows of ``sequence`` tokens a step.
        log_every: steps whose mean loss makes one line.
        evaluate_every: steps between held-out losses; 0: at the end alone.
        norms_every: steps between statistics of the norms' inputs; 0: never.
        deterministic: without kernels that sum in an order of their own, as some of CUDA do.
    """

    size: str
    norm: str
    recipe: str
    lr: float
    steps: int
    warmup: int
    batch: int
    sequence: int
    held_out_rows: int
    forward: str | None = None
    p: float = 2.0
    gradient: str = "true"
    inner: str = "inductor"
    seed: int = 0
    weight_decay: float = 0.1
    clip: float = 1.0
    log_every: int = 10
    evaluate_every: int = 0
    norms_every: int = 0
    deterministic: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises BadInput for values that no run can have, before anything is built."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} {getattr(self, name)!r}: choose {', '.join(allowed)}")
        for name in ("lr", "steps", "batch", "sequence", "p", "clip", "held_out_rows", "log_every"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise BadInput(f"{name} {value!r}: give a number above 0")
        if not 0 <= self.warmup < self.steps:
            raise BadInput(f"warmup {self.warmup}: give 0 to {self.steps - 1}, below the steps")
        if not torch.device(self.device).type == "cpu" and not torch.cuda.is_available():
            raise BadInput(f"device {self.device!r}: torch finds no GPU; use device cpu")
        backend_of(self)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


_CHOICES: Mapping[str, Any] = {
    "size": SIZES,
    "norm": NORMS,
    "gradient": GRADIENTS,
    "inner": INNERS,
}


def new_run(size: str, norm: str, recipe: str, *, tokens: int | None = None, **given: Any) -> Run:
    """A run with its size's own settings where none are given.

    Args:
        tokens: in the place of ``steps``: as many steps as read at least that many.

    Raises:
        BadInput: a value that is not allowed.
    """
    if size not in SIZES:
        raise BadInput(f"size {size!r}: choose {', '.join(SIZES)}")
    own = SIZES[size]
    names = ("lr", "batch", "sequence", "steps", "held_out_rows")
    settings = {**{name: getattr(own, name) for name in names}, **given}
    if settings.get("device", "cpu") == "cpu":
        # For a CPU, code generation takes longer than the run.
        settings.setdefault("inner", "aot_eager")
    if tokens is not None:
        settings["steps"] = math.ceil(tokens / (settings["batch"] * settings["sequence"]))
    settings.setdefault("warmup", min(100, settings["steps"] // 10))
    return Run(size=size, norm=norm, recipe=recipe, **settings)


@dataclass(frozen=True)
class Backend:
    """What torch.compile is given."""

    backend: str | Callable[..., Any]
    options: dict[str, Any] | None


def backend_of(run: Run) -> Backend:
    """The arm of a run. Nothing else differs between arms.

    Raises:
        BadInput: no such recipe, or one that leaves MXNorm nothing to act on.
    """
    if run.recipe == NO_CASTS:
        if run.norm != "rmsnorm" or run.forward is not None:
            raise BadInput("recipe bf16 has no casts to take maxima of: use norm rmsnorm with it")
        return Backend(run.inner, None)
    options: dict[str, Any] = {
        "estimator": NORMS[run.norm],
        "p": run.p,
        "gradient": run.gradient,
        "quantize": "all",
        "modules": {"lm_head": False},
        "inner": run.inner,
    }
    if run.recipe != FORWARD_ONLY:
        options["recipe"] = recipe_of(run)
    elif run.forward is not None:
        options["format"] = run.forward
    # The function itself, so that the package need not be installed.
    return Backend(mxnorm, options)


def recipe_of(run: Run) -> str | dict[str, Any]:
    spec: str | dict[str, Any] = run.recipe
    try:
        if run.recipe.startswith("{"):
            spec = json.loads(run.recipe)
        if run.forward is not None:
            base = spec if isinstance(spec, dict) else {"base": spec}
            spec = {**base, "forward": run.forward}
        recipe = functional.recipe(spec)
    except (ValueError, TypeError) as error:
        raise BadInput(f"recipe {run.recipe!r}, forward {run.forward!r}: {error}") from None
    if run.norm == "mxnorm" and recipe.forward.left.format is None:
        raise BadInput(
            f"recipe {run.recipe!r} leaves the forward in high precision, where MXNorm has no "
            "maxima to take: add forward mxfp8, or use norm rmsnorm"
        )
    return spec


@dataclass(frozen=True)
class Places:
    """Files of a run. They do not change its losses.

    Attributes:
        metrics: JSONL file; None: none is written.
        checkpoint: folder; None: no checkpoints.
        checkpoint_every: steps.
        deadline: time.time() after which the run stops; None: never.
    """

    metrics: Path | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 0
    deadline: float | None = None
