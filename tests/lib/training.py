"""One training step of a Llama, and how near two steps' gradients are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import build_llama, token_ids
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

IDS = token_ids()
# Relative norm. Sums of gradients in another order differ by float32's last bit; bf16 keeps 8.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Gradients = dict[str, Tensor]


def train(
    model: Callable[..., Any], parameters: nn.Module, ids: Tensor = IDS
) -> tuple[Tensor, Gradients]:
    """Logits, and the gradients of those parameters that want one."""
    parameters.zero_grad()
    output = model(ids, labels=ids, use_cache=False)
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


def assert_gradients_equal(a: Gradients, b: Gradients) -> None:
    assert a.keys() == b.keys()
    different = [name for name in b if not torch.equal(a[name], b[name])]
    assert not different, worst_gradient(a, b)


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


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = token_ids(6)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@dataclass(frozen=True)
class Step:
    """What one step of a HuggingFace Trainer saw: ids, number of tokens, loss."""

    ids: Tensor
    tokens: Any
    loss: Tensor


class _RecordingTrainer(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Step] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        tokens = kwargs.get("num_items_in_batch")
        self.seen.append(Step(inputs["input_ids"], tokens, loss.detach()))
        return loss


LEARNING_RATE = 0.1


def train_with_trainer(model: nn.Module, folder: Path) -> list[Step]:
    """Three steps of SGD."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = _RecordingTrainer(model=model, args=arguments, train_dataset=_Rows())
    trainer.train()
    return trainer.seen


def repeat_by_hand(model: nn.Module, steps: Sequence[Step]) -> list[Tensor]:
    """The same steps on another model; returns their losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in steps:
        loss = model(step.ids, labels=step.ids, num_items_in_batch=step.tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses
