"""Gradients of every architecture of ``examples/models.py``, against one of ``functional``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import (
    BF16,
    F32,
    assert_sites_are_the_norms_that_ran,
    build,
    compiled,
    expected_warnings,
    models,
    outputs_of,
    same_bits,
)
from functional_mode import FunctionalMode
from torch import Tensor, nn

import mxnorm_pass

pytestmark = expected_warnings

# Relative norm. Sums of gradients in another order differ by float32's last bit; bf16 keeps 8.
TOLERANCE = {F32: 1e-5, BF16: 1e-2}
# One of each: rounding before and after the gain, 1 + w, a mean in another dtype, readers that are
# no linears, and cross attention that reads the encoder's norm in every layer.
IN_BF16 = ["Llama", "Gemma-3", "DeepSeek-V3", "GPT-OSS", "T5"]


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, F32) for name in models.ARCHITECTURES), *((name, BF16) for name in IN_BF16)],
)
def test_gradients_are_those_of_functional(name, dtype) -> None:
    model = build(name, dtype)
    with FunctionalMode(model, "mxnorm") as mode:
        want, want_gradients = train(model, model)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model), model)
    assert same_bits(got, want)
    assert_sites_are_the_norms_that_ran(report, mode)
    assert [graph.name for graph in report.graphs] == ["training_0"]
    assert gradients.keys() == want_gradients.keys()
    for parameter, gradient in want_gradients.items():
        error = (gradients[parameter].double() - gradient.double()).norm()
        assert error <= TOLERANCE[dtype] * gradient.double().norm(), parameter


@pytest.mark.parametrize("gradient", ["orthogonal", "paper"])
@pytest.mark.parametrize("name", ["Gemma-2", "Mixtral"])
def test_other_gradients(name, gradient) -> None:
    model = build(name, F32)
    with FunctionalMode(model, "mxnorm", gradient=gradient):
        _, want = train(model, model)
    _, got = train(compiled(model, gradient=gradient), model)
    for parameter in want:
        error = (got[parameter] - want[parameter]).norm()
        assert error <= TOLERANCE[F32] * want[parameter].norm(), parameter


def train(
    call: Callable[..., Any], model: nn.Module
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and gradients of all parameters for seeded cotangents of all outputs."""
    model.zero_grad()
    outputs = outputs_of(call, models.example_inputs(model))
    random = torch.Generator().manual_seed(4)
    cotangents = [torch.randn(y.shape, generator=random).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, cotangents)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return tuple(y.detach() for y in outputs), gradients
