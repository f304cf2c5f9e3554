"""Ranks of a data-parallel run under a recipe that is random."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import LIB
from torch import Tensor

RANKS = 2


def gradients_of_ranks(store: Path) -> list[dict[str, Tensor]]:
    """What each rank's process says, by name."""
    command = [sys.executable, str(LIB / "ranks.py")]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), [errors for _, errors in ended]
    said = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    return [{name: torch.tensor(values) for name, values in one.items()} for one in said]


@pytest.mark.full
def test_ranks_draw_words_of_their_own(tmp_path: Path) -> None:
    """Else averaging their gradients would not average the noise. Data and seeds are the same."""
    first, second = gradients_of_ranks(tmp_path / "store")
    for rank in (first, second):
        assert torch.equal(rank["own"], rank["own again"])
    noise = (first["own"] - second["own"]).norm() / first["own"].norm()
    assert 0.01 < noise < 1
    mean = (first["own"] + second["own"]) / 2
    assert torch.equal(first["averaged"], second["averaged"])
    torch.testing.assert_close(first["averaged"], mean)
