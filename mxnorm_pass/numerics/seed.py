"""Seeds of recipes that are random."""

from __future__ import annotations

import torch
from torch import Tensor

# They leave room for a rank to be added.
_SEEDS = 2**62


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a compiled backward may draw another seed; pass seed= instead"
)
def draw_seed(device: torch.device | None = None) -> Tensor:
    """The one place that asks torch's generator: a seed, [] int64, that differs between ranks.

    Ranks that share a ``torch.manual_seed`` would round alike, and averaging their gradients would
    not average the noise. ``torch.compile`` breaks the graph here, so that the seed is an input of
    what follows: where a random op's value is for the backward alone, AOTAutograd's partitioner
    (torch 2.13) puts the op into both graphs and saves some of what comes of the first draw. Two
    operands' transforms are then of different signs, and do not cancel.
    """
    seed: Tensor = torch.randint(_SEEDS, (), dtype=torch.int64, device=device) + _rank()
    return seed


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return 0
