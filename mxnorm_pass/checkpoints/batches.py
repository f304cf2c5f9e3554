"""The user's batches: checked, split, run, and what the model says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = Mapping[str, Any] | Tensor
Model = Callable[..., Any]

_IGNORED = -100
_HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Split:
    """The batches that weights are fitted on, and those that only judge them."""

    fitted: list[Batch]
    held_out: list[Batch]


def split_batches(batches: Iterable[Batch]) -> Split:
    """Check the batches and hold out the last quarter of them, at least one.

    Raises:
        ValueError: they are no batches, fewer than two, or hold NaN or infinite numbers.
    """
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}; it must be a list of batches, each a dict of "
            "the model's inputs or a tensor"
        )
    listed = list(batches)
    for i, batch in enumerate(listed):
        check_batch(batch, i)
    if len(listed) < 2:
        raise ValueError(
            f"{len(listed)} batches were given; calibration needs at least 2, of which it holds "
            "one out to measure the loss. 8 batches of 512 tokens are a good start"
        )
    held_out = max(1, round(_HELD_OUT_SHARE * len(listed)))
    return Split(listed[:-held_out], listed[-held_out:])


def check_batch(batch: object, index: int) -> None:
    if not isinstance(batch, (Mapping, Tensor)):
        raise ValueError(
            f"batch {index} is a {type(batch).__name__}; it must be a dict of the model's inputs "
            "or a tensor"
        )
    for name, value in _tensors(batch).items():
        if value.numel() == 0:
            raise ValueError(f"batch {index}: {name} has shape {tuple(value.shape)}: no tokens")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"batch {index}: {name} holds NaN or infinite numbers")


def _tensors(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"the tensor": batch}
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def run(model: Model, batch: Batch, device: torch.device) -> Any:
    """The model's output; the batch may lie on another device."""
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return model(**moved)


def attention_mask(batch: Batch) -> Tensor | None:
    """[B, T], bool: which positions hold a token; None where all do."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def token_rows(batch: Batch, rows: Tensor) -> Tensor:
    """[..., D] -> [T, D] without the rows of padding."""
    mask, flat = attention_mask(batch), rows.reshape(-1, rows.shape[-1])
    if mask is not None and rows.shape[:-1] in (mask.shape, (mask.numel(),)):
        return flat[mask.flatten().to(rows.device)]
    return flat


def has_tokens(batch: Batch) -> bool:
    """Does anything of the batch count: is it not all padding, are its labels not all ignored?"""
    mask = attention_mask(batch)
    labels = None if isinstance(batch, Tensor) else batch.get("labels")
    unmasked = mask is None or bool(mask.any())
    return unmasked and (not isinstance(labels, Tensor) or bool((labels != _IGNORED).any()))


@dataclass(frozen=True)
class Loss:
    """A sum over tokens, in nats, so that batches of any size can be added."""

    total: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else math.nan

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.total + other.total, self.tokens + other.tokens)


def loss_of(output: Any, batch: Batch) -> Loss:
    """The model's own loss where the batch has labels, else that of predicting the next token.

    Raises:
        ValueError: neither can be had.
    """
    labels = None if isinstance(batch, Tensor) else batch.get("labels")
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor) and isinstance(labels, Tensor):
        tokens = int((labels != _IGNORED).sum())
        # The mean of no losses is NaN.
        return Loss(float(own) * tokens, tokens) if tokens else Loss()
    logits = logits_of(output)
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != logits.shape[:-1] or ids.is_floating_point():
        raise ValueError(
            f"the loss is not defined: the output has logits of shape {tuple(logits.shape)} and "
            "the batch no input_ids of that shape. Give each batch `labels` that the model "
            "computes its loss from"
        )
    return _next_token_loss(logits, ids, attention_mask(batch))


def _next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Loss:
    targets = ids[..., 1:].to(logits.device)
    if mask is not None:
        both = (mask[..., 1:] & mask[..., :-1]).to(logits.device)
        targets = targets.masked_fill(~both, _IGNORED)
    predictions = logits[..., :-1, :].flatten(0, -2)
    total = F.cross_entropy(
        predictions.float(), targets.flatten(), ignore_index=_IGNORED, reduction="sum"
    )
    return Loss(float(total), int((targets != _IGNORED).sum()))


def logits_of(output: Any) -> Tensor:
    """[..., V]: the output's ``logits``, or the output itself, or its first element."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ValueError(
            f"the model returns a {type(output).__name__} without logits; calibration needs "
            "logits [..., V], or `labels` in each batch and a `loss` in the output"
        )
    return logits


def check_finite(loss: Loss, batch: str) -> Loss:
    if not loss.tokens:
        raise ValueError(f"{batch} has no token whose loss counts")
    if not math.isfinite(loss.mean):
        raise ValueError(
            f"the model's loss on {batch} is {loss.mean}, with its RMS exact: calibration needs "
            "batches on which it is finite"
        )
    return loss
