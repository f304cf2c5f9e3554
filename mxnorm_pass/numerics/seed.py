"""Seeds of recipes that are random."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# They leave room for a rank and a key to be added.
_SEED_BITS = 62


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
    seed: Tensor = torch.randint(2**_SEED_BITS, (), dtype=torch.int64, device=device) + _rank()
    return seed


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return 0


def linear_key(name: str, call: int = 0) -> int:
    """What is added to a step's seed for one call of the linear of that dotted name."""
    digest = hashlib.sha256(f"{name}#{call}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)
