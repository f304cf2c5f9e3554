"""Run a model on batches under an emulation, one progress bar for all of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxnorm_pass.checkpoints.batches import Batch, Loss, check_finite, logits_of, loss_of, run
from mxnorm_pass.checkpoints.calibrate.emulation import Emulation
from mxnorm_pass.checkpoints.calibrate.fallback import Estimates
from mxnorm_pass.checkpoints.calibrate.moments import BlockMoments, ChannelPower


@dataclass
class Runner:
    """A model on its device; ``bar`` counts the runs."""

    model: nn.Module
    device: torch.device
    bar: Any

    def observe(
        self, emulation: Emulation, observer: ChannelPower | BlockMoments, batches: Iterable[Batch]
    ) -> None:
        """Show every norm's input to the observer, under exact RMS."""
        emulation.observer, emulation.estimates = observer, {}
        with emulation.entered(self.model):
            for i, batch in enumerate(batches):
                observer.batch = batch
                loss = loss_of(run(self.model, batch, self.device), batch)
                check_finite(loss, f"batch {i}")
                self.bar.update()
        emulation.observer = None

    def loss(self, emulation: Emulation, estimates: Estimates, batches: Iterable[Batch]) -> float:
        """Mean loss per token, in nats; infinite if it is not a number."""
        emulation.estimates = dict(estimates)
        total = Loss()
        with emulation.entered(self.model):
            for batch in batches:
                total += loss_of(run(self.model, batch, self.device), batch)
                self.bar.update()
        return total.mean if total.mean == total.mean else float("inf")

    def logits(self, emulation: Emulation, estimates: Estimates, batch: Batch) -> Tensor:
        emulation.estimates = dict(estimates)
        with emulation.entered(self.model):
            logits = logits_of(run(self.model, batch, self.device))
        self.bar.update()
        return logits
