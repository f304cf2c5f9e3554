"""Random words from a seed and a position: Philox 4x32-10.

A word depends on its seed and counter alone, so a graph, eager code and a kernel that each work on
a part of a tensor, in any order, draw the same. Counters are laid out for ``tl.philox`` of Triton,
whose four words serve four neighbours in a row.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

import torch
from torch import Tensor

Matmul = Literal["forward", "dgrad", "wgrad"]
_MATMUL_NUMBERS: Final[dict[Matmul, int]] = {"forward": 0, "dgrad": 1, "wgrad": 2}

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD_BITS = 32
_WORD = (1 << _WORD_BITS) - 1
_WORDS_PER_COUNTER = 4


class Use(IntEnum):
    """What the words of one matmul are for."""

    SIGNS = 0
    LEFT = 1
    RIGHT = 2


@dataclass(frozen=True, eq=False)
class Draw:
    """The randomness of one matmul: no other one of the same seed sees the same words.

    Attributes:
        seed: [] int64, of one linear in one step, see ``seed.draw_seed``.
        matmul: of that linear.
    """

    seed: Tensor
    matmul: Matmul

    def words(self, rows: int, columns: int, use: Use) -> Tensor:
        """[rows, columns] int64, uniform in [0, 2**32).

        Word [r, c] is number c % 4 of the counter (use, c // 4, matmul, r) under the seed as key.
        So it depends on neither the number of rows nor that of columns.
        """
        device = self.seed.device
        quad = torch.arange(-(-columns // _WORDS_PER_COUNTER), device=device)
        row = torch.arange(rows, device=device).unsqueeze(-1)
        first, third = (torch.full_like(row, n) for n in (use, _MATMUL_NUMBERS[self.matmul]))
        # Positions stand where the key is mixed in before anything is multiplied: a range times a
        # large constant is computed in 32 bits by Inductor's C++ (torch 2.13).
        words = philox(self.seed, (first, quad, third, row))
        return torch.stack(words, -1).flatten(-2)[:, :columns]


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-10, four words for each counter.

    Args:
        seed: int64; its lower half is the first word of the key.
        counter: int64 in [0, 2**32), shapes that broadcast together.

    Returns:
        Four int64 tensors in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, (seed >> _WORD_BITS) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower word of a product of 32-bit words."""
    # Of the factor less 2**32 the product stays in int64's range, beyond which C++ defines none.
    product = x * (factor - (1 << _WORD_BITS))
    return (product >> _WORD_BITS) + x, product & _WORD
