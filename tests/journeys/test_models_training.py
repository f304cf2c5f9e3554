"""Gradients of every architecture of ``examples/models.py``, against one of ``functional``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

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
from pairwise import each_value, some
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass.numerics.norm import Gradient

pytestmark = expected_warnings

# Relative norm. Most are equal bit for bit; an embedding's and a convolution's gradients, and those
# of a norm that many layers read, are sums that AOTAutograd adds up in another order.
TOLERANCE = {F32: 1e-6, BF16: 1e-2}
# One of each: rounding before and after the gain, 1 + w, a mean in another dtype, readers that are
# no linears, and cross attention that reads the encoder's norm in every layer.
IN_BF16 = ["Llama", "Gemma-3", "DeepSeek-V3", "GPT-OSS", "T5"]
GRADIENTS = get_args(Gradient)


@pytest.mark.full
@each_value(name=list(models.ARCHITECTURES), gradient=GRADIENTS)
def test_gradients_are_those_of_functional(name, gradient) -> None:
    """The true gradient is that of the forward, too, as ``verify`` finds it."""
    check(name, F32, gradient, verify=gradient == "true")


@pytest.mark.full
@some(["Llama", "T5"], name=IN_BF16)
def test_gradients_in_bf16(name) -> None:
    check(name, BF16, "true", verify=False)


def check(name: str, dtype: torch.dtype, gradient: Gradient, verify: bool) -> None:
    model = build(name, dtype)
    with FunctionalMode(model, "mxnorm", gradient=gradient) as mode:
        want, want_gradients = train(model, model)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, gradient=gradient, verify=verify), model)
    assert same_bits(got, want)
    assert_sites_are_the_norms_that_ran(report, mode)
    assert [graph.name for graph in report.graphs] == ["training_0"]
    assert gradients.keys() == want_gradients.keys()
    for parameter, wanted in want_gradients.items():
        error = (gradients[parameter].double() - wanted.double()).norm()
        assert error <= TOLERANCE[dtype] * wanted.double().norm(), parameter


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
