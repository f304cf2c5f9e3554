"""``examples/sanitize_kernels.py`` launches what it says: compute-sanitizer itself needs a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import sanitize_kernels
import torch

from mxnorm_pass.kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.full
@pytest.mark.parametrize(
    "function, shape, count", [("along_d", (5, 96), 4), ("along_both", (96, 160), 6)]
)
def test_as_many_launches_as_it_says(function: str, shape: tuple[int, int], count: int) -> None:
    with mock.patch.object(launch, "launcher", wraps=launch.launcher) as launches:
        getattr(sanitize_kernels, function)(*shape, device=DEVICE)
    assert launches.call_count == count


@pytest.mark.parametrize("rows", [1, 5])
def test_linears(rows: int) -> None:
    with mock.patch.object(launch, "launcher", wraps=launch.launcher) as launches:
        sanitize_kernels.linears(rows, 128, device=DEVICE, columns=21)
    assert launches.call_count == 2
