"""Where the scales of a matrix lie in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

ScaleLayout = Literal["row-major", "blocked"]


def blocked_scales_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape in the 128x4 blocked layout of scales [..., K] of ``shape``."""
    *leading, width = shape
    return 32 * ((math.prod(leading) + 127) // 128), 16 * ((width + 3) // 4)


def block_size_of(values: Sequence[int], scales: Sequence[int]) -> int:
    """D / K, of the shapes of values [..., D] and row-major scales [..., K].

    Raises:
        ValueError: the shapes do not belong together.
    """
    if (
        len(scales) != len(values)
        or not scales
        or tuple(scales[:-1]) != tuple(values[:-1])
        or scales[-1] == 0
        or values[-1] % scales[-1] != 0
    ):
        raise ValueError(
            f"scales has shape {tuple(scales)}; values of shape {tuple(values)} need row-major "
            "scales, [..., D / block size]; those of the 128x4 layout are for matrix "
            "multiplications only"
        )
    return values[-1] // scales[-1]


def blocked_scales(scales: Tensor) -> Tensor:
    """Scales in the 128x4 blocked layout that ``torch._scaled_mm`` reads.

    Tiles of 128 rows by 4 blocks, padded with zero bytes; row 32 i + j of a tile lies at [j, i].
    Source: cuBLAS documentation, "1D block scaling factors layout".

    Args:
        scales: [..., K], one byte per block or any other number.

    Returns:
        [32 ceil(T / 128), 16 ceil(K / 4)], T the product of the leading dimensions.
    """
    width = scales.shape[-1]
    rows = scales.reshape(-1, width)
    height = rows.shape[0]
    tiles_down, tiles_across = (height + 127) // 128, (width + 3) // 4
    padded = F.pad(rows, (0, 4 * tiles_across - width, 0, 128 * tiles_down - height))
    tiles = padded.reshape(tiles_down, 4, 32, tiles_across, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(32 * tiles_down, 16 * tiles_across)
