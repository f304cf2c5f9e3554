"""Recipes from what users write: a name, or a dict that names matmuls and operands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, get_args

from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.philox import Matmul
from mxnorm_pass.numerics.recipe import RECIPES, MatmulRecipe, OperandCast, Recipe

# What left and right are called, by matmul.
OPERANDS: Final[dict[Matmul, tuple[str, str]]] = {
    "forward": ("input", "weight"),
    "dgrad": ("grad_output", "weight"),
    "wgrad": ("grad_output", "input"),
}
_BASE = "base"
_DEPTH_KEYS = ("high_precision_first", "high_precision_last")
_OPERAND_KEYS = ("format", "rounding", "square_blocks")
_HADAMARD_KEYS = ("hadamard", "signs")


def recipe(spec: Recipe | str | Mapping[str, Any]) -> Recipe:
    """The recipe of a name, or of a dict.

    Args:
        spec: one of ``RECIPES``, or a dict of "forward", "dgrad" and "wgrad", each None for high
            precision, the name of a format, or a dict of "format", "rounding" and "square_blocks"
            of both operands (see :class:`OperandCast`), the same of one operand under its name
            ("input", "weight", "grad_output"), "hadamard" (g, 0 for none) and "signs" (see
            :class:`Hadamard`), and of "high_precision_first" and "high_precision_last", shares of
            the depth (see :class:`Recipe`). What is left out is that of the recipe that "base"
            is or names, or high precision. For example
            ``{"base": "mxfp4-rht-sr", "forward": "mxfp8"}``, or ``{"wgrad": {"format": "nvfp4",
            "grad_output": {"rounding": "stochastic"}, "hadamard": 16}}``.

    Raises:
        ValueError: no such name, key or value; the message says where, and what is allowed.
    """
    if isinstance(spec, Recipe):
        return spec
    if isinstance(spec, str):
        return _named(spec, "recipe")
    _check_keys(spec, (_BASE, *get_args(Matmul), *_DEPTH_KEYS), "recipe")
    given: dict[str, Any] = {name: spec[name] for name in _DEPTH_KEYS if name in spec}
    given |= {name: _matmul(spec[name], name) for name in get_args(Matmul) if name in spec}
    return replace(_base(spec.get(_BASE, Recipe())), **given)


def _base(spec: Any) -> Recipe:
    return spec if isinstance(spec, Recipe) else _named(spec, f"recipe[{_BASE!r}]")


def _named(name: Any, at: str) -> Recipe:
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(_unknown(at, name, RECIPES))
    return RECIPES[name]


def _matmul(spec: Any, name: Matmul) -> MatmulRecipe:
    at = f"recipe[{name!r}]"
    both = _operand_fields(spec)
    operands = OPERANDS[name]
    _check_keys(both, (*_OPERAND_KEYS, *operands, *_HADAMARD_KEYS), at)
    shared = {key: both[key] for key in _OPERAND_KEYS if key in both}
    try:
        shared["format"] = _format(shared.get("format"))
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from error
    left, right = (
        _operand(shared, both.get(operand, {}), f"{at}[{operand!r}]") for operand in operands
    )
    try:
        return MatmulRecipe(left, right, _hadamard(both))
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from error


def _operand(shared: Mapping[str, Any], spec: Any, at: str) -> OperandCast:
    own = _operand_fields(spec)
    _check_keys(own, _OPERAND_KEYS, at)
    # An operand of high precision has no use for the rounding that both share.
    fields = own if own.get("format", ...) is None else {**shared, **own}
    try:
        return OperandCast(**{**fields, "format": _format(fields.get("format"))})
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from error


def _format(name: Any) -> BlockFormat | None:
    if name is None or isinstance(name, BlockFormat):
        return name
    if not isinstance(name, str):
        raise ValueError(f"format is {name!r}; it must be a name, such as 'mxfp8', or None")
    return block_format(name)


def _hadamard(fields: Mapping[str, Any]) -> Hadamard | None:
    size = fields.get("hadamard", 0)
    if size is None or (size == 0 and not isinstance(size, bool)):
        if "signs" in fields:
            raise ValueError("signs belong to a Hadamard transform; give 'hadamard', such as 64")
        return None
    return Hadamard(size, **{key: fields[key] for key in ("signs",) if key in fields})


def _operand_fields(spec: Any) -> Any:
    """A format, or None, in the place of a dict is short for that format alone."""
    return {"format": spec} if spec is None or isinstance(spec, str) else spec


def _check_keys(spec: Any, allowed: Iterable[str], at: str) -> None:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{at} is {spec!r}; it must be a name or a dict")
    names = tuple(allowed)
    for key in spec:
        if key not in names:
            raise ValueError(_unknown(f"a key of {at}", key, names))


def _unknown(what: str, value: Any, allowed: Iterable[str]) -> str:
    names = list(allowed)
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    hint = f"did you mean {near[0]!r}? Allowed" if near else "allowed"
    return f"{what} is {value!r}; {hint}: {', '.join(map(repr, names))}"
