"""Recipes as data: in what the three matmuls of a linear read their operands.

Of Y = X W^T, X [T, K] and W [N, K], the forward contracts K, dgrad, dX = dY W, contracts N, and
wgrad, dW = dY^T X, contracts T. Each is left right^T with the contraction last, where blocks lie:

========  ============================  ==================  =======
matmul    left                          right               product
========  ============================  ==================  =======
forward   input X [T, K]                weight W [N, K]     [T, N]
dgrad     grad_output dY [T, N]         weight W^T [K, N]   [T, K]
wgrad     grad_output dY^T [N, T]       input X^T [K, T]    [N, K]
========  ============================  ==================  =======

Sources of the named recipes: Mishra et al. 2025, arXiv 2506.08027, as torchao 0.18 trains
(prototype/moe_training/mxfp8_linear.py) ("mxfp8"); McLean et al. 2026, arXiv 2603.13180
("mxfp8-e5m2"); Tseng et al. 2025, arXiv 2502.20586, and amazon-science/mxfp4-llm ("mxfp4", "-sr",
"-rht", "-rht-sr"); NVIDIA 2025, arXiv 2509.25149, and NVFP4BlockScaling of TransformerEngine
(common/recipe/__init__.py) ("nvfp4").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from mxnorm_pass.numerics.checks import check_choice
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.philox import Matmul
from mxnorm_pass.numerics.stochastic import headroom

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class OperandCast:
    """How a matmul reads one of its operands.

    Attributes:
        format: None for high precision.
        rounding: "nearest", ties to even, or "stochastic".
        square_blocks: one scale for block size x block size elements, so that a matrix and its
            transpose have the same values (arXiv 2509.25149, section 4.3).
    """

    format: BlockFormat | None = None
    rounding: Rounding = "nearest"
    square_blocks: bool = False

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, get_args(Rounding))
        if not isinstance(self.square_blocks, bool):
            raise ValueError(f"square_blocks is {self.square_blocks!r}; it must be a bool")
        if self.format is None and (self.is_stochastic or self.square_blocks):
            raise ValueError(
                "rounding and square_blocks belong to a cast; give the operand a format, such as "
                "'mxfp4', or leave them out"
            )

    def __str__(self) -> str:
        if self.format is None:
            return "high precision"
        words = [self.format.name]
        words += ["stochastic"] if self.is_stochastic else []
        words += ["in square blocks"] if self.square_blocks else []
        return " ".join(words)

    @property
    def is_stochastic(self) -> bool:
        """Does its rounding need random words?"""
        return self.rounding == "stochastic"

    @property
    def block_size(self) -> int:
        """What the contraction is padded to a multiple of."""
        return 1 if self.format is None else self.format.block_size

    @property
    def headroom(self) -> float:
        """What the cast holds of its operand: 3/4 in MXFP4 with stochastic rounding, mostly 1."""
        if self.format is None or not self.is_stochastic:
            return 1.0
        return headroom(self.format)


@dataclass(frozen=True)
class MatmulRecipe:
    """How a matmul left right^T reads its operands; the default is high precision.

    Attributes:
        left: of grad_output, or of the forward's input.
        right: of the weight, or of wgrad's input.
        hadamard: that both go through along the contraction before their casts. It belongs to
            the matmul, since of one operand alone it would not cancel.
    """

    left: OperandCast = OperandCast()
    right: OperandCast = OperandCast()
    hadamard: Hadamard | None = None

    def __str__(self) -> str:
        left, right = str(self.left), str(self.right)
        transform = "" if self.hadamard is None else f", Hadamard {self.hadamard.size}"
        return (left if left == right else f"{left} times {right}") + transform

    @property
    def is_random(self) -> bool:
        """Does it need a seed?"""
        signs = self.hadamard is not None and self.hadamard.signs == "random"
        return signs or self.left.is_stochastic or self.right.is_stochastic

    @property
    def multiple(self) -> int:
        """What the contraction is padded to, with zeros, which add nothing to the product."""
        size = 1 if self.hadamard is None else self.hadamard.size
        return math.lcm(self.left.block_size, self.right.block_size, size)

    @property
    def gain(self) -> float:
        """What the product is multiplied by: 16/9 where both operands hold 3/4 of theirs."""
        return 1 / (self.left.headroom * self.right.headroom)


@dataclass(frozen=True)
class Recipe:
    """The three matmuls of a linear in training; the default is high precision.

    Attributes:
        forward: Y = X W^T.
        dgrad: dX = dY W.
        wgrad: dW = dY^T X.
        high_precision_first, high_precision_last: the shares of a model's layers, at its start and
            at its end, whose linears stay in high precision in all three (see :meth:`layers_of`).
            It means nothing to a linear alone.
    """

    forward: MatmulRecipe = MatmulRecipe()
    dgrad: MatmulRecipe = MatmulRecipe()
    wgrad: MatmulRecipe = MatmulRecipe()
    high_precision_first: float = 0.0
    high_precision_last: float = 0.0

    def __post_init__(self) -> None:
        first, last = self.high_precision_first, self.high_precision_last
        for name, share in (("high_precision_first", first), ("high_precision_last", last)):
            is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not is_number or not 0 <= share <= 1:
                raise ValueError(
                    f"{name} is {share!r}; it must be a share of the layers, a number from 0 to 1, "
                    "such as 2 / 62"
                )
            object.__setattr__(self, name, float(share))
        if first + last > 1:
            raise ValueError(
                f"high_precision_first is {first!r} and high_precision_last {last!r}; together "
                "they must be at most 1, which is all layers"
            )

    @property
    def has_depth(self) -> bool:
        """Does it leave layers in high precision by their place in the depth of the model?"""
        return self.high_precision_first > 0 or self.high_precision_last > 0

    @staticmethod
    def layers_of(share: float, count: int) -> int:
        """How many of ``count`` layers a share is: the nearest number, a half rounded up."""
        return math.floor(share * count + 0.5)

    def matmul(self, name: Matmul) -> MatmulRecipe:
        """The matmul of that name."""
        matmuls: dict[Matmul, MatmulRecipe] = {
            "forward": self.forward, "dgrad": self.dgrad, "wgrad": self.wgrad
        }  # fmt: skip
        return matmuls[name]

    @property
    def is_random(self) -> bool:
        """Does one of its matmuls need a seed?"""
        return any(self.matmul(name).is_random for name in get_args(Matmul))


def is_uniform(matmul: MatmulRecipe) -> bool:
    """Are both operands of high precision, or rounded to nearest in one format?

    The right one, a weight, may be in square blocks.
    """
    left, right = matmul.left, matmul.right
    alike = left.format == right.format and matmul.hadamard is None
    return alike and not (left.is_stochastic or right.is_stochastic or left.square_blocks)


def in_format(fmt: BlockFormat | str) -> Recipe:
    """Both operands of the forward rounded to nearest; the backward in high precision."""
    cast = OperandCast(block_format(fmt))
    return Recipe(forward=MatmulRecipe(cast, cast))


def _mxfp8(grad_output: str) -> Recipe:
    e4m3, grad = OperandCast(block_format("mxfp8")), OperandCast(block_format(grad_output))
    backward = MatmulRecipe(grad, e4m3)
    return Recipe(MatmulRecipe(e4m3, e4m3), backward, backward)


def _mxfp4(rounding: Rounding, hadamard: Hadamard | None) -> Recipe:
    # The specification's scale mode, as microxcaling emulates it; not this package's default.
    cast = OperandCast(block_format("mxfp4 e2m1 floor block 32"), rounding)
    backward = MatmulRecipe(cast, cast, hadamard)
    return Recipe(dgrad=backward, wgrad=backward)


def _nvfp4() -> Recipe:
    fmt = block_format("nvfp4")
    nearest, weight = OperandCast(fmt), OperandCast(fmt, square_blocks=True)
    grad = OperandCast(fmt, "stochastic")
    return Recipe(
        forward=MatmulRecipe(nearest, weight),
        dgrad=MatmulRecipe(grad, weight),
        wgrad=MatmulRecipe(grad, nearest, Hadamard(16, "fixed")),
        # Of the 62 blocks of the 12B model (section 4.1).
        high_precision_first=2 / 62,
        high_precision_last=8 / 62,
    )


RECIPES: Final = {
    "mxfp8": _mxfp8("mxfp8"),
    "mxfp8-e5m2": _mxfp8("mxfp8 e5m2"),
    "mxfp4": _mxfp4("nearest", None),
    "mxfp4-sr": _mxfp4("stochastic", None),
    "mxfp4-rht": _mxfp4("nearest", Hadamard(64)),
    "mxfp4-rht-sr": _mxfp4("stochastic", Hadamard(64)),
    "nvfp4": _nvfp4(),
}
