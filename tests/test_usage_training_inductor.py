"""Combinations of what tests/test_usage_training.py tests, with Inductor's kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from reference import Recipe, build_llama, reference_of, token_ids
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training import Gradients, flat, gradients_of, relative_error, with_lora

import mxnorm_pass


@dataclass(frozen=True)
class Case:
    """A way to train one layer.

    Attributes:
        build: makes the model.
        fused: how many norms of it are fused.
        recipe: what its reference computes.
        around: context of forward and backward.
    """

    build: Callable[[], nn.Module]
    fused: int
    recipe: Recipe = field(default_factory=Recipe)
    modules: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def checkpointed(**overrides: Any) -> nn.Module:
    model = build_llama(layers=1, **overrides).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


CASES = {
    "checkpointing, fused head tied to the embedding": Case(
        partial(checkpointed, tie_word_embeddings=True),
        fused=3,
        recipe=Recipe(head=True),
        modules={"lm_head": True},
    ),
    "autocast, LoRA": Case(
        partial(with_lora, 8, layers=1),
        fused=2,
        modules={"*.lora_*": False},
        around=partial(torch.autocast, "cpu", torch.bfloat16),
    ),
    "compiled autograd": Case(
        checkpointed,
        fused=2,
        modules={"*.q_proj": False},
        recipe=Recipe(off=("q_proj",)),
        around=partial(torch._dynamo.config.patch, compiled_autograd=True),
    ),
}


def accumulated(model: nn.Module, compile_step: Callable[..., Any]) -> Gradients:
    """Gradients of two backward calls."""

    def step(ids: Tensor) -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    run = compile_step(step)
    for seed in (0, 1):
        run(token_ids().roll(seed, 1))
    return gradients_of(model)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_that_of_aot_eager(case) -> None:
    """Against float64, at most 1.5 times that of aot_eager, which is tested against functional."""
    reference = reference_of(case.build(), case.recipe).double()
    truth = accumulated(reference, lambda step: step)
    errors = {}
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        counters.clear()
        model = case.build()
        options = {"inner": inner, "modules": case.modules}
        with case.around(), mxnorm_pass.record() as report:
            compile_step = partial(torch.compile, backend="mxnorm", options=options)
            got = accumulated(model, compile_step)
        assert [len(g.sites) for g in report.graphs] == [3]
        assert len(report.fused) == case.fused
        captures = counters["compiled_autograd"]["captures"]
        assert bool(captures) == (case is CASES["compiled autograd"])
        assert got.keys() == truth.keys()
        errors[inner] = relative_error(flat(got), flat(truth))
    assert errors["inductor"] <= 1.5 * errors["aot_eager"], errors
