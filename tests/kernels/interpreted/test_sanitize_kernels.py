"""``examples/sanitize_kernels.py`` launches what it says: compute-sanitizer itself needs a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import sanitize_kernels
import torch

from mxnorm_pass.kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.full
@pytest.mark.parametrize("function, shape", [("along_d", (5, 96)), ("along_both", (96, 160))])
def test_four_launches_a_shape(function: str, shape: tuple[int, int]) -> None:
    with mock.patch.object(launch, "launcher", wraps=launch.launcher) as launches:
        getattr(sanitize_kernels, function)(*shape, device=DEVICE)
    assert launches.call_count == 4
