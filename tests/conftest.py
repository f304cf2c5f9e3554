"""Each test compiles from nothing, and a compile's warnings do not hide a later test's."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

import mxnorm_pass
from mxnorm_pass.report import announce

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers already fill the cores.
    torch.set_num_threads(1)

# PyTorch writes its structured trace as soon as this logger has a handler, and pytest gives one to
# each logger that does not propagate.
logging.getLogger("torch.__trace").propagate = True


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not full":
        # The job on the lowest versions has no Hypothesis, and runs all of its few tests.
        from example_counts import draw_fewer

        draw_fewer()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A row that is left out of a test that is itself left out waits for a run that names it."""
    for item in items:
        if len(list(item.iter_markers("full"))) > 1:
            item.add_marker("exhaustive")
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Garbage collections leave out what was imported, and come less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


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
