"""Random words that a kernel draws with Triton's own Philox are those of ``numerics``."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import triton
import triton.language as tl
from kernel_rows import DEVICE

from mxnorm_pass.numerics.philox import ROUNDS as _ROUNDS
from mxnorm_pass.numerics.philox import Draw, Matmul, Use

ROWS, QUADS = 8, 16
ROUNDS = tl.constexpr(_ROUNDS)


@triton.jit
def words_kernel(
    seed_ptr, out_ptr, USE: tl.constexpr, MATMUL: tl.constexpr, R: tl.constexpr, Q: tl.constexpr
):
    row = tl.arange(0, R)[:, None] + tl.zeros((R, Q), tl.int32)
    quad = tl.arange(0, Q)[None, :] + tl.zeros((R, Q), tl.int32)
    use, matmul = tl.full((R, Q), USE, tl.int32), tl.full((R, Q), MATMUL, tl.int32)
    words = tl.philox(tl.load(seed_ptr), use, quad, matmul, row, ROUNDS)
    at = out_ptr + (row * Q + quad) * 4
    for i in tl.static_range(4):
        tl.store(at + i, words[i].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 5, 2**62 - 1, -1])
@pytest.mark.parametrize("use", Use)
@pytest.mark.parametrize("number, matmul", list(enumerate(get_args(Matmul))))
def test_words_are_tritons(number: int, matmul: Matmul, use: Use, seed: int) -> None:
    seeds = torch.tensor(seed, device=DEVICE)
    words = torch.empty(ROWS, 4 * QUADS, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](seeds, words, int(use), number, ROWS, QUADS)
    got = torch.stack([words % 2**16, words // 2**16], -1).flatten(1)
    assert torch.equal(got, Draw(seeds, matmul).numbers(ROWS, 8 * QUADS, use))
