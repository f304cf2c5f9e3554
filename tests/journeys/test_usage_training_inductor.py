"""What test_usage_training.py tests, at once and with Inductor's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Recipe, build_llama, reference_of, token_ids
from torch import nn
from torch._dynamo.utils import counters
from training import (
    GRADIENT_TOLERANCE,
    Gradients,
    assert_gradients_close,
    flat,
    gradients_of,
    relative_error,
    repeat_by_hand,
    train_with_trainer,
    with_lora,
)

import mxnorm_pass


def accumulated(run: Callable[..., Any], model: nn.Module) -> Gradients:
    """Gradients of two backward calls."""
    for shift in (0, 1):
        ids = token_ids().roll(shift, 1)
        run(ids, labels=ids, use_cache=False).loss.backward()
    return gradients_of(model)


@pytest.mark.full
def test_checkpointing_autocast_lora_and_accumulation() -> None:
    """Error against float64 at most 1.5 times that of aot_eager, which functional vouches for."""
    model = with_lora(8, layers=1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    reference = reference_of(model, Recipe()).double()
    truth = accumulated(reference, reference)
    errors = {}
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        model.zero_grad()
        options = {"inner": inner, "modules": {"*.lora_*": False}}
        compiled = torch.compile(model, backend="mxnorm", options=options)
        with torch.autocast("cpu", torch.bfloat16), mxnorm_pass.record() as report:
            got = accumulated(compiled, model)
        # PEFT's hook that has the frozen embeddings' output want a gradient breaks the graph.
        assert [len(g.sites) for g in report.graphs if g.sites] == [3] and len(report.fused) == 2
        assert got.keys() == truth.keys()
        errors[inner] = relative_error(flat(got), flat(truth))
    assert errors["inductor"] <= 1.5 * errors["aot_eager"], errors


@pytest.mark.full
def test_trainer_and_tied_embeddings_on_a_model_compiled_in_place(tmp_path) -> None:
    """Parameters after three steps, their error against float64 as above."""
    errors = {}
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        model = build_llama(layers=1, use_cache=False, tie_word_embeddings=True)
        truth = reference_of(model, Recipe()).double()
        model.compile(backend="mxnorm", options={"inner": inner})
        with mxnorm_pass.record() as report:
            steps = train_with_trainer(model, tmp_path)
        assert len(report.fused) == 2 and model.lm_head.weight is model.model.embed_tokens.weight
        repeat_by_hand(truth, steps)
        got, want = (dict(m.named_parameters()) for m in (model, truth))
        errors[inner] = relative_error(flat(got), flat(want))
    assert errors["inductor"] <= 1.5 * errors["aot_eager"], errors


@pytest.mark.full
def test_compiled_autograd_changes_no_gradient() -> None:
    """The backward is compiled by itself, and its matmuls stay as they are."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64)), torch.randn(8, 64)

    def step() -> None:
        model.zero_grad()
        model(x).square().sum().backward()

    results, captures = [], []
    for compiled_autograd in (False, True):
        torch._dynamo.reset()
        counters.clear()
        with torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
            with mxnorm_pass.record() as report:
                torch.compile(step, backend="mxnorm", options={"quantize": "all"})()
        results.append(gradients_of(model))
        captures.append(counters["compiled_autograd"]["captures"])
        assert [len(g.sites) for g in report.graphs] == [1] and len(report.fused) == 1
    assert captures == [0, 1]
    assert_gradients_close(results[1], results[0], GRADIENT_TOLERANCE[torch.float32])
