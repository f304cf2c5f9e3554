"""What each option may be; every error names the option, its value and what is allowed."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch

from mxnorm_pass.names import check_pattern
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES, ScaleMode
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.parse_recipe import recipe
from mxnorm_pass.numerics.recipe import RECIPES, Recipe, is_uniform
from mxnorm_pass.numerics.rms import Estimator
from mxnorm_pass.options.calibration import Calibration
from mxnorm_pass.options.inductor import invalid, one_of

Gain = Literal["auto", "fold", "activation"]

Quantize = Literal["norm-fed", "existing", "all"]
Inner = Literal["inductor", "aot_eager", "eager"]

_Validator = Callable[[str, object], Any]

_ELEM_DTYPES = tuple(ELEMENT_DTYPES)
DEFAULT_ELEM_DTYPE = torch.float8_e4m3fn
DEFAULT_SCALE_MODE: ScaleMode = "rceil"
OVERRIDABLE = (
    "estimator",
    "p",
    "gain",
    "gradient",
    "format",
    "elem_dtype",
    "scale_mode",
    "tensor_scale",
    "recipe",
)
Format = Literal["mxfp8", "mxfp6", "mxfp6 e2m3", "mxfp6 e3m2", "mxfp4", "nvfp4"]
TensorScale = Literal["bound", "amax"]


def _choice(alias: Any) -> _Validator:
    allowed: tuple[str, ...] = get_args(alias)

    def validate(label: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise invalid(label, value, one_of(map(repr, allowed)))
        return value

    return validate


def _validate_p(label: str, value: object) -> float:
    allowed = "a finite int or float greater than 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(label, value, allowed)
    try:
        p = float(value)
    except OverflowError:
        raise invalid(label, value, allowed) from None
    if not math.isfinite(p) or p <= 0:
        raise invalid(label, value, allowed)
    return p


def _validate_elem_dtype(label: str, value: object) -> torch.dtype:
    if not isinstance(value, torch.dtype) or value not in _ELEM_DTYPES:
        raise invalid(label, value, one_of(_ELEM_DTYPES))
    return value


def _validate_bool(label: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise invalid(label, value, "True or False")
    return value


def _validate_prefix(label: str, value: object) -> str:
    components = value.split(".") if isinstance(value, str) else [""]
    plain = all(c and not set(c) & set("*?[]: ") for c in components)
    if not isinstance(value, str) or (value and not plain):
        allowed = "the full name of one module, such as 'model.layers.3', without wildcards"
        raise invalid(label, value, f"{allowed} (mxnorm_pass.compile_layers takes a pattern)")
    return value


def _validate_calibration(label: str, value: object) -> Calibration | None:
    if value is None or isinstance(value, Calibration):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise invalid(label, value, "None, an mxnorm_pass.Calibration or the path of one")
    try:
        return Calibration.load(value)
    except (OSError, ValueError) as error:
        raise invalid(label, value, f"the path of a calibration, but {error}") from None


def _validate_recipe(label: str, value: object) -> Recipe | None:
    if value is None:
        return None
    if not isinstance(value, (str, Mapping, Recipe)):
        allowed = f"None, a dict, or one of {', '.join(map(repr, RECIPES))}"
        raise invalid(label, value, allowed)
    try:
        found = recipe(value)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    if not is_uniform(found.forward):
        raise invalid(
            label,
            value,
            "a recipe whose forward rounds both operands to nearest in one format, with no "
            "Hadamard transform, or casts none (functional.recipe_linear takes others)",
        )
    return found


def _validate_num_layers(label: str, value: object) -> Mapping[str, int]:
    allowed = "a mapping from the name of what holds layers to their number, {'model.layers': 32}"
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise invalid(label, value, allowed)
    for name, count in value.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise invalid(f"{label}[{name!r}]", count, "a number of layers, an int from 1 on")
    return types.MappingProxyType(dict(sorted(value.items())))


def _validate_modules(label: str, value: object) -> Mapping[str, bool | Mapping[str, Any]]:
    if not isinstance(value, Mapping):
        raise invalid(label, value, "a mapping from name pattern to True, False or a dict")
    rules: dict[str, bool | Mapping[str, Any]] = {}
    for pattern, rule in value.items():
        check_pattern(label, pattern)
        rules[pattern] = _validate_rule(f"{label}[{pattern!r}]", rule)
    return types.MappingProxyType(rules)


def _validate_rule(label: str, rule: object) -> bool | Mapping[str, Any]:
    if isinstance(rule, bool):
        return rule
    if not isinstance(rule, Mapping):
        allowed = f"True, False or a dict of overrides, with keys {one_of(OVERRIDABLE)}"
        raise invalid(label, rule, allowed)
    given = {name: _validate_override(label, name, value) for name, value in rule.items()}
    check_agreement(
        given.get("format", "mxfp8"),
        given.get("elem_dtype", DEFAULT_ELEM_DTYPE),
        given.get("scale_mode", DEFAULT_SCALE_MODE),
        lambda name: f"{label}[{name!r}]",
    )
    return types.MappingProxyType(given)


def check_agreement(
    format: str,
    elem_dtype: torch.dtype,
    scale_mode: str,
    label_of: Callable[[str], str] = str,
) -> None:
    """Raises a ValueError where an option says of elements or scales what the format does not."""
    if format != "mxfp8" and elem_dtype != DEFAULT_ELEM_DTYPE:
        allowed = f"none beside format={format!r}: it is of 'mxfp8' alone"
        raise invalid(label_of("elem_dtype"), elem_dtype, allowed)
    if format == "nvfp4" and scale_mode != DEFAULT_SCALE_MODE:
        allowed = "none beside format='nvfp4', whose scales are no powers of two"
        raise invalid(label_of("scale_mode"), scale_mode, allowed)


def check_recipe(recipe: Recipe | None, quantize: str, forward: tuple[str, object, str]) -> None:
    """Raises a ValueError where other options say what a recipe says, or leave it nothing."""
    if recipe is None:
        return
    if quantize == "existing":
        allowed = "'norm-fed' or 'all' beside a recipe, which is of casts that the backend inserts"
        raise invalid("quantize", quantize, allowed)
    defaults = ("mxfp8", DEFAULT_ELEM_DTYPE, DEFAULT_SCALE_MODE)
    for name, value, default in zip(
        ("format", "elem_dtype", "scale_mode"), forward, defaults, strict=True
    ):
        if value != default:
            allowed = "none beside a recipe: write it into the recipe's 'forward'"
            raise invalid(name, value, allowed)


def _validate_override(label: str, name: object, value: object) -> Any:
    if not isinstance(name, str) or name not in OVERRIDABLE:
        raise ValueError(
            f"{label} overrides {name!r} (with {value!r}), which cannot be set per module: "
            f"expected {one_of(OVERRIDABLE)}"
        )
    return VALIDATORS[name](f"{label}[{name!r}]", value)


VALIDATORS: dict[str, _Validator] = {
    "estimator": _choice(Estimator),
    "p": _validate_p,
    "gain": _choice(Gain),
    "gradient": _choice(Gradient),
    "quantize": _choice(Quantize),
    "format": _choice(Format),
    "elem_dtype": _validate_elem_dtype,
    "scale_mode": _choice(ScaleMode),
    "tensor_scale": _choice(TensorScale),
    "recipe": _validate_recipe,
    "num_layers": _validate_num_layers,
    "modules": _validate_modules,
    "calibration": _validate_calibration,
    "verify": _validate_bool,
    "inner": _choice(Inner),
    "freezing": _validate_bool,
    "prefix": _validate_prefix,
}
