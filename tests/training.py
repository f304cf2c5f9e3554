"""One training step of a Llama, and how near two steps' gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import build_llama, token_ids
from torch import Tensor, nn

IDS = token_ids()
# Relative norm. Sums of gradients in another order differ by float32's last bit; bf16 keeps 8.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Gradients = dict[str, Tensor]


def train(model: Callable[..., Any], parameters: nn.Module) -> tuple[Tensor, Gradients]:
    """Logits, and the gradients of those parameters that want one."""
    parameters.zero_grad()
    output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), gradients_of(parameters)


def gradients_of(parameters: nn.Module) -> Gradients:
    trained = [(n, p) for n, p in parameters.named_parameters() if p.requires_grad]
    return {n: p.grad.clone() for n, p in trained if p.grad is not None}


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def worst_gradient(a: Gradients, b: Gradients) -> tuple[str, float]:
    errors = {name: relative_error(a[name], b[name]) for name in b}
    return max(errors.items(), key=lambda item: item[1])


def assert_gradients_close(a: Gradients, b: Gradients, tolerance: float) -> None:
    assert a.keys() == b.keys()
    name, error = worst_gradient(a, b)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def flat(gradients: Gradients) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([g.double().flatten() for g in gradients.values()])


def with_lora(rank: int, dropout: float = 0.0, layers: int = 2) -> PeftModel:
    """A Llama with adapters, away from their zero initialisation, at some of its linears."""
    config = LoraConfig(
        r=rank,
        target_modules=["q_proj", "v_proj", "up_proj"],
        lora_dropout=dropout,
        init_lora_weights=False,
    )
    return get_peft_model(build_llama(layers=layers), config).train()
