"""Orders of the residual channels that let block absmaxes tell the RMS.

A trained residual stream has a few channels that hold most of a row's energy. With p = 2 the
absmax of a block is such a channel's square, exactly, as long as no second one hides behind it in
the same block. So each outlier gets a block of its own, filled up with the weakest channels, and
the others follow by their power, so that the channels of a block are alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The outliers to set apart: the fit tells how many are best.
_OUTLIERS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def candidate_orders(power: Tensor, block_size: int) -> list[Tensor]:
    """The natural order, and one for each number of outlier channels that is worth a try.

    Args:
        power: [D], mean share of each channel in the square of its row.

    Returns:
        Orders [D], int64, on the CPU: new channel i is old channel ``order[i]``.
    """
    power = power.cpu()
    most = len(power) // block_size // 2
    numbers = [n for n in _OUTLIERS if n <= most]
    return [torch.arange(len(power)), *(_isolate(power, n, block_size) for n in numbers)]


def _isolate(power: Tensor, outliers: int, block_size: int) -> Tensor:
    ranked = power.argsort(descending=True, stable=True)
    fillers = outliers * (block_size - 1)
    strongest, rest = ranked[:outliers], ranked[outliers:]
    middle, weakest = rest[: len(rest) - fillers], rest[len(rest) - fillers :]
    own_blocks = torch.cat([strongest[:, None], weakest.reshape(outliers, block_size - 1)], dim=1)
    return torch.cat([own_blocks.flatten(), middle])
