"""Random numbers from a seed and a position: Philox 4x32-7.

A number depends on its seed and counter alone, so a graph, eager code and a kernel that each work
on a part of a tensor, in any order, draw the same. Counters are laid out for ``tl.philox`` of
Triton, whose four words serve eight neighbours in a row.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, whose table 2
has 7 rounds as the fewest that pass all of BigCrush; Random123.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

import torch
from torch import Tensor

Matmul = Literal["forward", "dgrad", "wgrad"]
_MATMUL_NUMBERS: Final[dict[Matmul, int]] = {"forward": 0, "dgrad": 1, "wgrad": 2}

ROUNDS: Final = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD_BITS = 32
_WORD = (1 << _WORD_BITS) - 1
BITS: Final = 16
_PER_COUNTER = 4 * _WORD_BITS // BITS


class Use(IntEnum):
    """What the numbers of one matmul are for."""

    SIGNS = 0
    LEFT = 1
    RIGHT = 2


@dataclass(frozen=True, eq=False)
class Draw:
    """The randomness of one matmul: no other one of the same seed sees the same numbers.

    Attributes:
        seed: [] int64, of one linear in one step, see ``seed.draw_seed``.
        matmul: of that linear.
        right_seed: of what is drawn of the right operand, signs included; None for ``seed``.
            Linears that read one input share it in wgrad, and so that input's cast.
    """

    seed: Tensor
    matmul: Matmul
    right_seed: Tensor | None = None

    def seed_of(self, use: Use) -> Tensor:
        """[] int64, the key of the numbers for that use."""
        return self.seed if use is Use.LEFT or self.right_seed is None else self.right_seed

    def numbers(self, rows: int, columns: int, use: Use) -> Tensor:
        """[rows, columns] int64, uniform in [0, 2**16).

        Number [r, c] is half c % 2, the lower one first, of word c % 8 // 2 of the counter (use,
        c // 8, matmul, r) under the seed as key. So it depends on neither the number of rows nor
        that of columns.
        """
        seed = self.seed_of(use)
        octet = torch.arange(-(-columns // _PER_COUNTER), device=seed.device)
        row = torch.arange(rows, device=seed.device).unsqueeze(-1)
        first, third = (torch.full_like(row, n) for n in (use, matmul_number(self.matmul)))
        # Positions stand where the key is mixed in before anything is multiplied: a range times a
        # large constant is computed in 32 bits by Inductor's C++ (torch 2.13).
        words = torch.stack(philox(seed, (first, octet, third, row)), -1)
        halves = torch.stack((words & ((1 << BITS) - 1), words >> BITS), -1)
        return halves.flatten(-3)[:, :columns]


def matmul_number(matmul: Matmul) -> int:
    """The third word of its counters."""
    return _MATMUL_NUMBERS[matmul]


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-7, four words for each counter.

    Args:
        seed: int64; its lower half is the first word of the key.
        counter: int64 in [0, 2**32), shapes that broadcast together.

    Returns:
        Four int64 tensors in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, (seed >> _WORD_BITS) & _WORD
    for _ in range(ROUNDS):
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
