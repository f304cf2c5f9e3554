"""Each test compiles from nothing, and a compile's warnings do not hide a later test's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

import mxnorm_pass
from mxnorm_pass import announce

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers already fill the cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch) -> Iterator[None]:
    """Own compile caches, and warnings that speak again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    announce._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mxnorm_pass.CalibrationWarning)
        yield
    torch._dynamo.reset()
