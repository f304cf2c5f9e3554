"""What the kernels of few rows are given: linears that read one x."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# As many as a launch takes: queries, keys and values.
MAX_LINEARS = 3


@dataclass(frozen=True)
class Linear:
    """One linear in MXFP8, and where its result goes.

    Attributes:
        weight: [N, K] float8_e4m3fn.
        scales: bytes [N, K / 32].
        bias: [N] or None; all linears of a launch have one, or none has.
        y: [M, N].
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    y: Tensor

    @property
    def columns(self) -> int:
        return self.weight.shape[0]


def slots(given: Iterable[Any], absent: Any = None) -> list[Any]:
    """One of each linear, filled up to ``MAX_LINEARS``."""
    filled = list(given)
    return filled + [absent] * (MAX_LINEARS - len(filled))
