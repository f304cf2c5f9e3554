"""The random Hadamard transform against scipy's matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import U, normal
from scipy.linalg import hadamard
from torch import Tensor

from mxnorm_pass.numerics.hadamard import Hadamard, Signs, hadamard_transform
from mxnorm_pass.numerics.philox import Draw

SIZES = [2, 16, 32, 64, 128, 256]
all_sizes = pytest.mark.parametrize("size", SIZES)
# TransformerEngine's, get_wgrad_sign_vector in pytorch/tensor/nvfp4_tensor.py.
NVIDIAS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]


def draw(seed: int = 0) -> Draw:
    return Draw(torch.tensor(seed), "wgrad")


def signs_of(transform: Hadamard, seed: int = 0) -> Tensor:
    """The first row of H is positive, so the first element of each unit vector shows its sign."""
    return transform.transform(torch.eye(transform.size), draw(seed))[:, 0].sign()


def matrix64(size: int, signs: Tensor) -> Tensor:
    h = torch.from_numpy(hadamard(size)).double() / math.sqrt(size)
    return signs.double().unsqueeze(-1) * h


@all_sizes
def test_every_piece_times_the_matrix(size: int) -> None:
    x, transform = normal(5, 3 * size), Hadamard(size)
    got = transform.transform(x, draw())
    matrix = matrix64(size, signs_of(transform))
    want = (x.double().unflatten(-1, (3, size)) @ matrix).flatten(-2)
    # log2 g sums and one product, each of relative error U, and the constant's own rounding.
    most = (x.double().abs().unflatten(-1, (3, size)) @ matrix.abs()).flatten(-2)
    assert got.dtype is torch.float32
    assert ((got - want).abs() <= (math.log2(size) + 2) * U * most).all()


@pytest.mark.parametrize("size", [16, 64, 256])
def test_integers_are_exact_where_the_root_is(size: int) -> None:
    x = normal(4, size).mul(100).round().bfloat16()
    want = x.double() @ matrix64(size, torch.ones(size))
    assert torch.equal(hadamard_transform(x, size).double(), want)


@all_sizes
@pytest.mark.parametrize("signs", ["random", "fixed", "none"])
def test_it_is_orthogonal(size: int, signs: Signs) -> None:
    transformed = Hadamard(size, signs).transform(torch.eye(size), draw()).double()
    error = transformed @ transformed.t() - torch.eye(size)
    assert error.abs().max() <= 4 * U


@all_sizes
@pytest.mark.parametrize("signs", ["random", "fixed", "none"])
def test_it_cancels_in_a_product(size: int, signs: Signs) -> None:
    a, b = normal(4, 2 * size), normal(4, 2 * size, seed=1)
    ha, hb = (Hadamard(size, signs).transform(x, draw()).double() for x in (a, b))
    most = a.double().norm(dim=-1)[:, None] * b.double().norm(dim=-1)
    error = (ha @ hb.t() - a.double() @ b.double().t()).abs()
    assert (error <= 2 * (math.log2(size) + 2) * math.sqrt(size) * U * most).all()


def test_signs_are_those_of_the_seed() -> None:
    random = Hadamard(64)
    assert torch.equal(signs_of(random), signs_of(random))
    assert not torch.equal(signs_of(random), signs_of(random, seed=1))
    other_matmul = random.transform(torch.eye(64), Draw(torch.tensor(0), "dgrad"))[:, 0].sign()
    assert not torch.equal(signs_of(random), other_matmul)
    many = torch.stack([signs_of(random, seed) for seed in range(64)])
    assert many.mean().abs() < 4 / many.numel() ** 0.5


def test_fixed_signs_are_nvidias() -> None:
    assert signs_of(Hadamard(16, "fixed")).tolist() == NVIDIAS
    assert signs_of(Hadamard(64, "fixed")).tolist() == 4 * NVIDIAS
    assert signs_of(Hadamard(8, "fixed")).tolist() == NVIDIAS[:8]


@pytest.mark.parametrize("size", [0, 1, 3, 48, -2, 2.0, True, "64", None])
def test_a_size_that_is_no_power_of_two(size: object) -> None:
    with pytest.raises(ValueError, match="power of two of at least 2"):
        Hadamard(size)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="signs is 'ones'; allowed: random, fixed, none"):
        Hadamard(16, "ones")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no multiple of 64; pad it"):
        hadamard_transform(normal(2, 96), 64)
    with pytest.raises(ValueError, match="random signs need a seed"):
        Hadamard(16).transform(normal(2, 16), None)
