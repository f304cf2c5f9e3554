"""Recipes of matmuls and operands as text, in which they cross the schemas of ops."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final

from mxnorm_pass.numerics.formats import block_format
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import Use
from mxnorm_pass.numerics.recipe import MatmulRecipe, OperandCast

# Both operands in high precision.
PLAIN: Final = ""


def recipe_text(recipe: MatmulRecipe) -> str:
    """The text that :func:`recipe_of_text` reads; "" for high precision."""
    if recipe == MatmulRecipe():
        return PLAIN
    fields: dict[str, Any] = {"left": _cast_fields(recipe.left)}
    fields["right"] = _cast_fields(recipe.right)
    return json.dumps(fields | _hadamard_fields(recipe.hadamard))


def operand_text(operand: Operand) -> str:
    """The text that :func:`operand_of_text` reads."""
    fields: dict[str, Any] = {"matmul": operand.matmul, "use": operand.use.value}
    fields["cast"] = _cast_fields(operand.cast)
    return json.dumps(fields | _hadamard_fields(operand.hadamard))


def _cast_fields(cast: OperandCast) -> list[Any] | None:
    if cast.format is None:
        return None
    return [cast.format.name, cast.rounding, cast.square_blocks]


def _hadamard_fields(hadamard: Hadamard | None) -> dict[str, Any]:
    return {} if hadamard is None else {"hadamard": [hadamard.size, hadamard.signs]}


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
        return MatmulRecipe(_cast(fields["left"]), _cast(fields["right"]), _hadamard(fields))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is no recipe of a matmul: {error}") from None


@cache
def operand_of_text(text: str) -> Operand:
    """The operand that :func:`operand_text` wrote.

    Raises:
        ValueError: it did not write that.
    """
    try:
        fields = json.loads(text)
        cast, hadamard = _cast(fields["cast"]), _hadamard(fields)
        return Operand(cast, hadamard, fields["matmul"], Use(fields["use"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is no operand of a matmul: {error}") from None


def _hadamard(fields: dict[str, Any]) -> Hadamard | None:
    return Hadamard(*fields["hadamard"]) if "hadamard" in fields else None


def _cast(fields: list[Any] | None) -> OperandCast:
    if fields is None:
        return OperandCast()
    name, rounding, square_blocks = fields
    return OperandCast(block_format(name), rounding, square_blocks)
