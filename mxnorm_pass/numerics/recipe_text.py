"""Recipes of matmuls as text, in which they cross the schemas of ops."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final

from mxnorm_pass.numerics.formats import block_format
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.recipe import MatmulRecipe, OperandCast

# Both operands in high precision.
PLAIN: Final = ""


def recipe_text(recipe: MatmulRecipe) -> str:
    """The text that :func:`recipe_of_text` reads; "" for high precision."""
    if recipe == MatmulRecipe():
        return PLAIN
    fields: dict[str, Any] = {"left": _operand(recipe.left), "right": _operand(recipe.right)}
    if recipe.hadamard is not None:
        fields["hadamard"] = [recipe.hadamard.size, recipe.hadamard.signs]
    return json.dumps(fields)


def _operand(cast: OperandCast) -> list[Any] | None:
    if cast.format is None:
        return None
    return [cast.format.name, cast.rounding, cast.square_blocks]


@cache
def recipe_of_text(text: str) -> MatmulRecipe:
    """The recipe that :func:`recipe_text` wrote.

    Raises:
        ValueError: it did not write that.
    """
    if text == PLAIN:
        return MatmulRecipe()
    try:
        fields = json.loads(text)
        hadamard = Hadamard(*fields["hadamard"]) if "hadamard" in fields else None
        return MatmulRecipe(_cast(fields["left"]), _cast(fields["right"]), hadamard)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is no recipe of a matmul: {error}") from None


def _cast(fields: list[Any] | None) -> OperandCast:
    if fields is None:
        return OperandCast()
    name, rounding, square_blocks = fields
    return OperandCast(block_format(name), rounding, square_blocks)
