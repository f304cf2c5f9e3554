"""The kernels' tests run in Triton's interpreter, or compiled on a GPU that has float8."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gluon_interpreter import GluonJITFunction, Interpreted
from torch import Tensor

from mxnorm_pass.kernels import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

# test_in_the_interpreter.py runs them in processes of their own.
collect_ignore_glob = [] if INTERPRETED or COMPILED else ["test_*.py"]


@pytest.fixture(autouse=True)
def interpreted_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton interprets its own kernels alone."""
    compiled = launch.launcher

    def launcher(kernel: Any) -> Any:
        is_gluon = isinstance(kernel, GluonJITFunction)
        return Interpreted(kernel) if INTERPRETED and is_gluon else compiled(kernel)

    monkeypatch.setattr(launch, "launcher", launcher)


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
