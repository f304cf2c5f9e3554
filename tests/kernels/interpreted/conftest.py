"""The kernels' tests run in Triton's interpreter, or compiled on a GPU that has float8."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

# test_in_the_interpreter.py runs them in processes of their own.
collect_ignore_glob = [] if INTERPRETED or COMPILED else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is 0xFF, NaN in every float format, so that nothing goes unwritten unseen."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            fresh.view(torch.uint8).fill_(0xFF)
            return fresh

        return allocate_poisoned

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
