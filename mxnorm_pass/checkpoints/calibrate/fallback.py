"""Which norms return to the exact RMS, so that the loss stays within its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.checkpoints.batches import Batch
from mxnorm_pass.checkpoints.calibrate.emulation import Estimate

Estimates = Mapping[str, Estimate]

# A ranking needs fewer tokens than a loss: the divergence of two models has little noise.
_TOKENS_TO_RANK = 512


def exact_norms(
    estimates: Estimates,
    loss: Callable[[Estimates], float],
    rank: Callable[[], Sequence[str]],
    budget: float,
) -> tuple[str, ...]:
    """The fewest of the costliest norms without whose estimates the loss is within ``budget``.

    Args:
        loss: of the model on held-out batches, under some of the estimates.
        rank: the norms, the costliest first; called only if the budget is exceeded.
    """
    if loss(estimates) <= budget:
        return ()
    ranked = rank()
    too_few, enough = 0, len(ranked)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        kept = {name: estimates[name] for name in ranked[middle:]}
        if loss(kept) <= budget:
            enough = middle
        else:
            too_few = middle
    return tuple(ranked[:enough])


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean of KL(reference || other) over rows of logits [..., V], in nats."""
    log_p = F.log_softmax(reference.float().flatten(0, -2), -1)
    log_q = F.log_softmax(logits.float().flatten(0, -2), -1)
    return float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))


def few_rows(batch: Batch) -> Batch:
    """The first rows of a batch, about as many as a ranking needs."""
    if isinstance(batch, Tensor):
        return batch[: _rows(batch)]
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.ndim >= 2]
    if not tensors:
        return batch
    size, rows = len(tensors[0]), _rows(tensors[0])
    is_row_wise = {k: isinstance(v, Tensor) and v.ndim and len(v) == size for k, v in batch.items()}
    return {k: v[:rows] if is_row_wise[k] else v for k, v in batch.items()}


def _rows(tensor: Tensor) -> int:
    length = tensor.shape[1] if tensor.ndim > 1 else 1
    return max(1, _TOKENS_TO_RANK // max(1, length))


@torch.no_grad()
def rank_by_cost(estimates: Estimates, logits: Callable[[Estimates], Tensor]) -> list[str]:
    """Norms by what each alone does to the model's predictions, the costliest first.

    Args:
        logits: of the model on one batch, under some of the estimates.
    """
    reference = logits({})
    costs = {}
    for name, estimate in estimates.items():
        costs[name] = divergence(reference, logits({name: estimate}))
    return sorted(costs, key=lambda name: (-costs[name], name))
