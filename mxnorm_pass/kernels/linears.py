"""What the kernels of few rows are given: linears that read one x."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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


def launch_arguments(linears: Sequence[Linear], words: torch.dtype | None = None) -> list[Any]:
    """Weights, scales, biases, results and columns, of each a place for ``MAX_LINEARS`` linears.

    Args:
        words: as which weights and scales are read, if not as what they are.
    """

    def as_words(tensor: Tensor) -> Tensor:
        return tensor if words is None else tensor.view(words)

    return [
        *_places(as_words(linear.weight) for linear in linears),
        *_places(as_words(linear.scales) for linear in linears),
        *_places(linear.bias for linear in linears),
        *_places(linear.y for linear in linears),
        *_places((linear.columns for linear in linears), absent=0),
    ]


def _places(given: Iterable[Any], absent: Any = None) -> list[Any]:
    filled = list(given)
    return filled + [absent] * (MAX_LINEARS - len(filled))
