"""Random numbers against Random123's published answers and integers of Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxnorm_pass.numerics.philox import Draw, Matmul, Use, philox
from mxnorm_pass.numerics.seed import draw_seed

# counter, key, words: the lines "philox4x32 7" of Random123's kat_vectors.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
Counter = tuple[int, int, int, int]


def seed_of(key: tuple[int, int]) -> Tensor:
    unsigned = key[0] | key[1] << 32
    return torch.tensor(unsigned - (1 << 64) * (unsigned >> 63))


def philox_of_integers(counter: Counter, key: tuple[int, int]) -> Counter:
    c0, c1, c2, c3 = counter
    for i in range(7):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers(counter: Counter, key: tuple[int, int], words: Counter) -> None:
    c0, c1, c2, c3 = map(torch.tensor, counter)
    assert tuple(map(int, philox(seed_of(key), (c0, c1, c2, c3)))) == words
    assert philox_of_integers(counter, key) == words


@pytest.mark.parametrize("matmul, number", [("forward", 0), ("dgrad", 1), ("wgrad", 2)])
@pytest.mark.parametrize("use, first", [(Use.SIGNS, 0), (Use.LEFT, 1), (Use.RIGHT, 2)])
def test_a_number_is_its_position_in_the_counter(
    matmul: Matmul, number: int, use: Use, first: int
) -> None:
    key = (77, 0x80000001)
    numbers = Draw(seed_of(key), matmul).numbers(3, 20, use)
    for row in range(3):
        for column in range(20):
            words = philox_of_integers((first, column // 8, number, row), key)
            halves = [half for word in words for half in (word % 2**16, word // 2**16)]
            assert numbers[row, column] == halves[column % 8]


def test_numbers_do_not_depend_on_the_shape_around_them() -> None:
    draw = Draw(torch.tensor(5), "dgrad")
    whole = draw.numbers(12, 33, Use.LEFT)
    assert torch.equal(draw.numbers(5, 7, Use.LEFT), whole[:5, :7])
    assert draw.numbers(0, 7, Use.LEFT).shape == (0, 7)
    assert draw.numbers(5, 0, Use.LEFT).shape == (5, 0)


def test_the_right_operand_may_have_a_seed_of_its_own() -> None:
    own, shared = torch.tensor(5), torch.tensor(6)
    draw = Draw(own, "wgrad", shared)
    for use, seed in [(Use.SIGNS, shared), (Use.LEFT, own), (Use.RIGHT, shared)]:
        want = Draw(seed, "wgrad").numbers(4, 64, use)
        assert torch.equal(draw.numbers(4, 64, use), want)


def test_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    """Mean, variance and correlation within 4 standard errors of those of uniform numbers."""
    numbers = Draw(torch.tensor(3), "wgrad").numbers(128, 512, Use.RIGHT)
    assert numbers.min() >= 0 and numbers.max() < 2**16
    uniform = (numbers.double() + 0.5) / 2**16 - 0.5
    count = uniform.numel()
    assert uniform.mean().abs() < 4 * (1 / 12 / count) ** 0.5
    assert (uniform.square().mean() - 1 / 12).abs() < 4 * (1 / 180 / count) ** 0.5
    for a, b in [(uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1])]:
        assert (a * b).mean().abs() < 4 / 12 / a.numel() ** 0.5


def test_torchs_generator_gives_the_seed() -> None:
    torch.manual_seed(1)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(1)
    assert torch.equal(first, draw_seed()) and torch.equal(second, draw_seed())
    assert first != second and first.shape == () and first.dtype is torch.int64


def test_ranks_of_one_manual_seed_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(rank: int) -> Tensor:
        torch.manual_seed(1)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        return Draw(draw_seed(), "dgrad").numbers(4, 64, Use.LEFT)

    zeroth, first = of(0), of(1)
    # Of 256 pairs of numbers, one in 65,536 is equal by chance.
    assert (zeroth == first).sum() <= 1
    assert torch.equal(first, of(1))
