"""Recipes by name and from dicts, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mxnorm_pass.functional import RECIPES, MatmulRecipe, OperandCast, Recipe, block_format, recipe
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.recipe import Rounding

E4M3, E5M2, NVFP4 = (OperandCast(block_format(f)) for f in ("mxfp8", "mxfp8 e5m2", "nvfp4"))
SQUARE = OperandCast(block_format("nvfp4"), square_blocks=True)


def mxfp4(rounding: Rounding) -> OperandCast:
    return OperandCast(block_format("mxfp4 e2m1 floor block 32"), rounding)


def backward(rounding: Rounding, g: int) -> Recipe:
    matmul = MatmulRecipe(mxfp4(rounding), mxfp4(rounding), Hadamard(g) if g else None)
    return Recipe(dgrad=matmul, wgrad=matmul)


SR_GRAD = OperandCast(block_format("nvfp4"), "stochastic")
TABLE = {
    "mxfp8": Recipe(*3 * [MatmulRecipe(E4M3, E4M3)]),
    "mxfp8-e5m2": Recipe(
        MatmulRecipe(E4M3, E4M3), MatmulRecipe(E5M2, E4M3), MatmulRecipe(E5M2, E4M3)
    ),
    "mxfp4": backward("nearest", 0),
    "mxfp4-sr": backward("stochastic", 0),
    "mxfp4-rht": backward("nearest", 64),
    "mxfp4-rht-sr": backward("stochastic", 64),
    "nvfp4": Recipe(
        MatmulRecipe(NVFP4, SQUARE),
        MatmulRecipe(SR_GRAD, SQUARE),
        MatmulRecipe(SR_GRAD, NVFP4, Hadamard(16, "fixed")),
        high_precision_first=2 / 62,
        high_precision_last=8 / 62,
    ),
}


def test_the_table() -> None:
    assert RECIPES == TABLE
    assert all(recipe(name) is RECIPES[name] for name in TABLE)


@pytest.mark.parametrize(
    "name, gains, random, multiples",
    [
        ("mxfp8", (1, 1, 1), False, (32, 32, 32)),
        ("mxfp4", (1, 1, 1), False, (1, 32, 32)),
        ("mxfp4-sr", (1, 16 / 9, 16 / 9), True, (1, 32, 32)),
        ("mxfp4-rht", (1, 1, 1), True, (1, 64, 64)),
        ("mxfp4-rht-sr", (1, 16 / 9, 16 / 9), True, (1, 64, 64)),
        ("nvfp4", (1, 1, 1), True, (16, 16, 16)),
    ],
)
def test_what_follows_from_a_recipe(
    name: str, gains: tuple[float, ...], random: bool, multiples: tuple[int, ...]
) -> None:
    of = RECIPES[name]
    matmuls = (of.forward, of.dgrad, of.wgrad)
    assert tuple(m.gain for m in matmuls) == pytest.approx(gains)
    assert tuple(m.multiple for m in matmuls) == multiples
    assert of.is_random == random


@pytest.mark.parametrize(
    "count, first, last",
    [(62, 2, 8), (2, 0, 0), (3, 0, 0), (4, 0, 1), (8, 0, 1), (16, 1, 2), (32, 1, 4), (126, 4, 16)],
)
def test_layers_of_nvfp4(count: int, first: int, last: int) -> None:
    """By hand: the nearest to count / 31 and 4 count / 31. The paper's own model has 62."""
    nvfp4 = RECIPES["nvfp4"]
    assert nvfp4.layers_of(nvfp4.high_precision_first, count) == first
    assert nvfp4.layers_of(nvfp4.high_precision_last, count) == last


def test_a_half_is_rounded_up() -> None:
    assert [Recipe.layers_of(0.5, count) for count in (1, 2, 3, 5)] == [1, 1, 2, 3]


def test_one_operand_with_headroom_gives_its_share() -> None:
    assert MatmulRecipe(mxfp4("stochastic"), mxfp4("nearest")).gain == pytest.approx(4 / 3)
    assert MatmulRecipe(mxfp4("stochastic")).gain == pytest.approx(4 / 3)


ABLATION = RECIPES["mxfp4-rht-sr"]
DICTS: list[tuple[dict[str, Any], Recipe]] = [
    ({}, Recipe()),
    ({"forward": "mxfp8"}, Recipe(forward=MatmulRecipe(E4M3, E4M3))),
    ({"base": "mxfp4-rht-sr", "forward": "mxfp8"},
     replace(ABLATION, forward=MatmulRecipe(E4M3, E4M3))),
    ({"base": "mxfp4-rht-sr", "dgrad": None}, replace(ABLATION, dgrad=MatmulRecipe())),
    ({"wgrad": {"format": "mxfp4 e2m1 floor block 32", "rounding": "stochastic", "hadamard": 128}},
     Recipe(wgrad=MatmulRecipe(mxfp4("stochastic"), mxfp4("stochastic"), Hadamard(128)))),
    ({"wgrad": {"format": "nvfp4", "grad_output": {"rounding": "stochastic"}, "hadamard": 16,
                "signs": "fixed"}}, Recipe(wgrad=TABLE["nvfp4"].wgrad)),
    ({"dgrad": {"grad_output": "mxfp8 e5m2", "weight": "mxfp8"}},
     Recipe(dgrad=MatmulRecipe(E5M2, E4M3))),
    ({"dgrad": {"format": block_format("mxfp8"), "rounding": "nearest", "weight": None}},
     Recipe(dgrad=MatmulRecipe(E4M3, OperandCast()))),
    ({"forward": {"format": "nvfp4", "weight": {"square_blocks": True}, "hadamard": 0}},
     Recipe(forward=MatmulRecipe(NVFP4, SQUARE))),
    ({"wgrad": {"hadamard": 64}}, Recipe(wgrad=MatmulRecipe(hadamard=Hadamard(64)))),
    ({"base": ABLATION, "forward": "mxfp8"},
     replace(ABLATION, forward=MatmulRecipe(E4M3, E4M3))),
    ({"high_precision_last": 1}, Recipe(high_precision_last=1.0)),
    ({"base": "nvfp4", "high_precision_first": 0},
     replace(TABLE["nvfp4"], high_precision_first=0.0)),
]  # fmt: skip


@pytest.mark.parametrize("spec, want", DICTS, ids=[str(spec) for spec, _ in DICTS])
def test_dicts(spec: dict[str, Any], want: Recipe) -> None:
    assert recipe(spec) == want
    assert recipe(want) is want


BAD: list[tuple[Any, str]] = [
    ("mxfp4-rht-rs", r"recipe is 'mxfp4-rht-rs'; did you mean 'mxfp4-rht-sr'\? Allowed: 'mxfp8'"),
    ("", "recipe is ''; allowed: 'mxfp8'"),
    (None, "recipe is None; it must be a name or a dict"),
    (4, "recipe is 4; it must be a name or a dict"),
    ({"base": "mxfp9"}, r"recipe\['base'\] is 'mxfp9'; did you mean 'mxfp"),
    ({"base": None}, r"recipe\['base'\] is None; allowed: 'mxfp8'"),
    ({"wgard": "mxfp8"}, "a key of recipe is 'wgard'; did you mean 'wgrad'?"),
    ({1: "mxfp8"}, "a key of recipe is 1; allowed: 'base', "),
    ({"dgrad": 8}, r"recipe\['dgrad'\] is 8; it must be a name or a dict"),
    ({"dgrad": "mxfp5"}, r"recipe\['dgrad'\]: format is 'mxfp5'; allowed"),
    ({"dgrad": {"weight": "mxfp5"}}, r"recipe\['dgrad'\]\['weight'\]: format is 'mxfp5'; allowed"),
    ({"dgrad": {"format": 8}}, "format is 8; it must be a name, such as 'mxfp8', or None"),
    ({"dgrad": {"roundign": "stochastic"}}, r"recipe\['dgrad'\] is 'roundign'.*'rounding'"),
    ({"dgrad": {"input": "mxfp8"}}, r"a key of recipe\['dgrad'\] is 'input'.*'grad_output'"),
    ({"dgrad": {"weight": {"hadamard": 16}}}, r"a key of recipe\['dgrad'\]\['weight'\]"),
    ({"wgrad": {"weight": "mxfp8"}}, r"a key of recipe\['wgrad'\] is 'weight'.*'input'"),
    ({"dgrad": {"format": "mxfp4", "rounding": "up"}}, "rounding is 'up'; allowed: nearest, stoch"),
    ({"dgrad": {"rounding": "stochastic"}}, "belong to a cast; give the operand a format"),
    ({"dgrad": {"format": "nvfp4", "square_blocks": 16}}, "square_blocks is 16; it must be a bool"),
    ({"dgrad": {"format": "mxfp4", "hadamard": 48}}, r"recipe\['dgrad'\]: hadamard is 48; it must"),
    ({"dgrad": {"format": "mxfp4", "hadamard": True}}, "hadamard is True; it must be a power of"),
    ({"dgrad": {"format": "mxfp4", "hadamard": "64"}}, "hadamard is '64'; it must be a power of"),
    ({"dgrad": {"format": "mxfp4", "signs": "fixed"}}, "signs belong to a Hadamard transform"),
    ({"dgrad": {"hadamard": 16, "signs": "one"}}, "signs is 'one'; allowed: random, fixed, none"),
]


BAD += [
    ({"high_precision_first": 2}, "high_precision_first is 2; it must be a share of the layers"),
    ({"high_precision_last": -0.1}, "high_precision_last is -0.1; .* from 0 to 1, such as 2 / 62"),
    ({"high_precision_last": math.nan}, "high_precision_last is nan; it must be a share"),
    ({"high_precision_last": True}, "high_precision_last is True; it must be a share"),
    ({"high_precision_last": "4"}, "high_precision_last is '4'; it must be a share"),
    ({"high_precision_first": 0.5, "high_precision_last": 0.6}, "together they must be at most 1"),
    ({"high_precision": 0.5}, "a key of recipe is 'high_precision'; did you mean 'high_precision_"),
]


@pytest.mark.parametrize("spec, message", BAD, ids=[str(spec) for spec, _ in BAD])
def test_bad_input(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(spec)
