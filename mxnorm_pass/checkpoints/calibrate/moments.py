"""What fits read of a running model, gathered token by token: sums, never activations."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxnorm_pass.checkpoints.batches import Batch, token_rows
from mxnorm_pass.checkpoints.calibrate.fit import Moments, block_weights
from mxnorm_pass.numerics.formats import MX_BLOCK_SIZE
from mxnorm_pass.numerics.rms import block_absmax


@dataclass
class ChannelPower:
    """An observer: for each norm the mean share of each channel in the square of its row."""

    batch: Batch | None = None
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, norm: str, x: Tensor) -> None:
        assert self.batch is not None
        rows = _normalised_rows(x, self.batch)
        self._sums[norm] = self._sums.get(norm, 0) + rows.square().sum(0, dtype=torch.float64)
        self._counts[norm] = self._counts.get(norm, 0) + len(rows)

    def mean(self, norms: Iterable[str]) -> Tensor:
        """[D], float64: the mean over those of the norms that saw tokens."""
        seen = [self._sums[norm] / self._counts[norm] for norm in norms if self._counts.get(norm)]
        return torch.stack(seen).mean(0)


@dataclass
class BlockMoments:
    """An observer: moments of each norm under each order of its channels.

    Attributes:
        p: exponent of the estimate.
        block_size: elements per block.
        orders: [D], int64; other norms than those of ``stream`` have the natural order alone.
        stream: names of the norms whose channels the orders are of.
    """

    p: float
    block_size: int = MX_BLOCK_SIZE
    orders: Sequence[Tensor] = ()
    stream: Container[str] = ()
    batch: Batch | None = None
    _moments: dict[tuple[str, int], Moments] = field(default_factory=dict)

    def __call__(self, norm: str, x: Tensor) -> None:
        assert self.batch is not None
        rows = _normalised_rows(x, self.batch)
        if not len(rows):
            return
        orders = self.orders if norm in self.stream else ()
        in_orders = [rows[:, order.to(rows.device)] for order in orders] or [rows]
        for i, ordered in enumerate(in_orders):
            moments = Moments.of(block_absmax(ordered, self.block_size).pow(self.p))
            key = (norm, i)
            known = self._moments.get(key)
            self._moments[key] = moments if known is None else known + moments

    def of(self, norm: str, order: int) -> Moments | None:
        """Moments under ``orders[order]``; None for a norm that saw no token."""
        return self._moments.get((norm, order), self._moments.get((norm, 0)))

    def mean_error(self, norms: Iterable[str], order: int) -> float:
        """Mean over the norms of what the best weights leave, see :meth:`Moments.error`."""
        seen = [found for norm in norms if (found := self.of(norm, order)) is not None]
        return sum(m.error(block_weights(m)) for m in seen) / max(1, len(seen))


def _normalised_rows(x: Tensor, batch: Batch) -> Tensor:
    """Rows [T, D], float32, divided by their RMS; those of zeros and of padding are left out."""
    rows = token_rows(batch, x).float()
    rms = rows.square().mean(-1, keepdim=True).sqrt()
    positive = rms[:, 0] > 0
    return rows[positive] / rms[positive]
