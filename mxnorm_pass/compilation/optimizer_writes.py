"""Writes of optimizers to weights of frozen graphs.

Fused optimizers, torch's and those with kernels of their own, write without counting it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_watched: WeakIdKeyDictionary = WeakIdKeyDictionary()


def count_writes(weights: Iterable[Tensor]) -> None:
    """From now on each step of an optimizer counts as a write to those that it trains."""
    for weight in weights:
        _watched[weight] = None
    _watch()


@cache
def _watch() -> None:
    register_optimizer_step_post_hook(_count)


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    increment_version([p for p in parameters if p.grad is not None and p in _watched])
