"""The options of the ``mxnorm`` backend, and what the rules of ``modules`` make of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mxnorm_pass.names import HEAD_NAMES, UnmatchedPattern, compile_pattern, nearest_names
from mxnorm_pass.numerics.formats import BlockFormat, ScaleMode, block_format
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.recipe import Recipe
from mxnorm_pass.numerics.rms import Estimator
from mxnorm_pass.options.calibration import Calibration
from mxnorm_pass.options.depth import Place, find_stacks, has_number, kept_by_depth, place_of
from mxnorm_pass.options.inductor import invalid
from mxnorm_pass.options.validate import (
    DEFAULT_ELEM_DTYPE,
    DEFAULT_SCALE_MODE,
    OVERRIDABLE,
    VALIDATORS,
    Format,
    Gain,
    Inner,
    Quantize,
    TensorScale,
    check_agreement,
    check_recipe,
)

# Estimated with block weights, kept exact, or exact since the calibration does not know the norm.
Calibrated = Literal["block weights", "exact", "unknown"]

# An object of its own, to tell it from a p = 2 that was asked for.
_DEFAULT_P = float("2")


@dataclass(frozen=True)
class ModuleConfig:
    """What applies to one module.

    Attributes:
        enabled: whether the module may be rewritten at all.
        config: the base config with the winning rule's overrides applied. Meaningful only where
            ``enabled`` is true.
        calibration: what the calibration does to a norm of that name; None where there is none
            or the winning rule overrules it. ``config.estimator`` is what follows from it.
        block_weights: [K] float32, with which the norm's RMS is estimated.
        kept_by_depth: why the recipe leaves a linear of that name in high precision where it casts
            others, as words after "a linear"; "" where it does not.
        depth_unknown: the recipe might do so, but where in the model that is, is not known.
    """

    enabled: bool
    config: MXNormConfig
    calibration: Calibrated | None = None
    block_weights: Tensor | None = field(default=None, compare=False)
    kept_by_depth: str = ""
    depth_unknown: bool = False

    @property
    def overrides(self) -> dict[str, str]:
        """The fields that rules may override, as text."""
        return {name: str(getattr(self.config, name)) for name in OVERRIDABLE}


@dataclass(frozen=True, kw_only=True)
class MXNormConfig:
    """Every choice the backend makes, validated and immutable.

    The source of names and defaults is the contract table of the design document. Configs are
    equal, and hash alike, when their fields are equal and ``modules`` has the same order.

    Attributes:
        estimator: "mxnorm" (RMS estimated from the block scales) or "exact" (fused RMSNorm and
            cast with the true RMS).
        p: exponent of the estimator's power mean; any finite int or float above 0, kept as float.
            With a calibration its exponent is the default, and no other is allowed.
        gain: "auto", "fold" or "activation": where the norm's weight is applied.
        gradient: "true", "orthogonal" or "paper".
        quantize: "norm-fed" (plain linears fed by a norm), "existing" (only casts already in the
            graph) or "all" (every linear).
        format: "mxfp8", "mxfp6" (elements e2m3, or "mxfp6 e3m2"), "mxfp4" or "nvfp4", of casts that
            the backend inserts.
        elem_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``, elements of "mxfp8".
        scale_mode: "rceil", "floor", "ceil" or "even", for casts to MX formats that the backend
            inserts.
        tensor_scale: "bound" or "amax": NVFP4's scale of the tensor that a norm has normalised,
            from what bounds it, or from its largest element, which takes another pass over it.
            Where the bound is far above what rows have (p below 1, weights near 0) it is "amax".
        recipe: what the three matmuls of a linear in training read: None (the forward in
            ``format``, the backward in high precision), the name of a recipe or a dict, see
            :func:`mxnorm_pass.functional.recipe`. It says what the forward's format is, too. Which
            of the first and last layers it leaves in high precision, a rule of ``modules`` with a
            recipe for some layers of a stack overrules.
        num_layers: name of what holds layers ("model.layers") to their number, where what is
            compiled does not show it: a layer on its own, or a stage of a pipeline. It goes before
            what is found.
        modules: name pattern to False, True or a dict of overrides of estimator, p, gain,
            gradient, format, elem_dtype, scale_mode, tensor_scale and recipe. A pattern is a glob,
            or a regular expression after "re:"; see ``resolve``. Copied, so later changes to the
            caller's dict are unseen.
        calibration: a :class:`mxnorm_pass.Calibration`, or the path of one, which is read here.
            Norms that it does not know stay exact. A rule that sets ``estimator`` overrules it.
        verify: check at compile time, on random data, that the gradients of what was rewritten
            are those of its forward and that "exact" changes no bit; see ``passes.verify``.
        inner: "inductor", "aot_eager" or "eager": what compiles the rewritten graph.
        freezing: Inductor's meaning: inference weights are folded, and cast once for all graphs.
            What is written into a weight later is cast anew; where it was folded, refused.
        prefix: full name of the module that is compiled on its own ("model.layers.3"); it goes in
            front of the names of the modules inside, in ``modules`` and in reports.

    Raises:
        ValueError: a field has a wrong type or value. The message names the field, the value and
            what is allowed; for an override it also names the pattern.
    """

    estimator: Estimator = "mxnorm"
    p: float = _DEFAULT_P
    gain: Gain = "auto"
    gradient: Gradient = "true"
    quantize: Quantize = "norm-fed"
    format: Format = "mxfp8"
    elem_dtype: torch.dtype = DEFAULT_ELEM_DTYPE
    scale_mode: ScaleMode = DEFAULT_SCALE_MODE
    tensor_scale: TensorScale = "bound"
    recipe: Recipe | None = None
    num_layers: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, bool | Mapping[str, Any]] = field(default_factory=dict)
    calibration: Calibration | None = None
    inner: Inner = "inductor"
    freezing: bool = False
    prefix: str = ""
    verify: bool = False

    def __post_init__(self) -> None:
        for name, validate in VALIDATORS.items():
            object.__setattr__(self, name, validate(name, getattr(self, name)))
        check_agreement(self.format, self.elem_dtype, self.scale_mode)
        check_recipe(self.recipe, self.quantize, (self.format, self.elem_dtype, self.scale_mode))
        if self.calibration is not None:
            _check_agreement(self, self.calibration)
            object.__setattr__(self, "p", self.calibration.p)

    @property
    def cast_format(self) -> BlockFormat:
        """Of the casts that the backend inserts."""
        if self.recipe is not None and self.recipe.forward.left.format is not None:
            return self.recipe.forward.left.format
        if self.format == "mxfp8":
            return BlockFormat.of(self.elem_dtype, self.scale_mode)
        fmt = block_format(self.format)
        return replace(fmt, scale_mode=self.scale_mode) if fmt.has_e8m0_scales else fmt

    @property
    def casts_forward(self) -> bool:
        """Do the linears that the backend casts read casts in the forward?"""
        return self.recipe is None or self.recipe.forward.left.format is not None

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """All that any module may have."""
        configs = (self, *(rule.config for rule in self._rules))
        return tuple(config.recipe for config in configs if config.recipe is not None)

    def with_layers_of(self, kinds: Mapping[str, str]) -> MXNormConfig:
        """Return the options with the number of layers, where a recipe asks for it.

        Args:
            kinds: the class name of every module that is known, by full dotted name.
        """
        if not any(recipe.has_depth for recipe in self.recipes):
            return self
        return replace(self, num_layers=find_stacks(kinds, self.prefix) | dict(self.num_layers))

    def resolve(self, name: str, opt_in: bool = False) -> ModuleConfig:
        """Return what applies to the module of that full dotted name.

        Every rule of ``modules`` is tried on the whole name, in order, and the last that matches
        wins entirely: overrides of earlier matches do not add up. False disables; True and a dict
        enable. Without a match the base config applies, enabled.

        A name whose last component is ``lm_head`` or ``output`` is disabled unless the winning
        pattern's text contains that component: "*" does not enable it, "*lm_head" does.
        ``opt_in`` asks the same of any other name.
        """
        key = (name, opt_in)
        resolved = self._resolved.get(key)
        if resolved is None:
            resolved = self._resolved[key] = self._resolve_uncached(name, opt_in)
        return resolved

    @property
    def estimates(self) -> bool:
        """Whether any norm's RMS may be estimated, be it by a rule of ``modules``."""
        configs = (self, *(rule.config for rule in self._rules))
        return any(config.estimator == "mxnorm" for config in configs)

    def turns_off(self, name: str) -> bool:
        """Return whether a rule of ``modules`` disables that module, rather than a default."""
        winner = self._winner(name)
        return winner is not None and not winner.enabled

    def unmatched_patterns(self, names: Iterable[str]) -> list[UnmatchedPattern]:
        """Return the patterns of ``modules`` that match none of ``names``, in rule order.

        A pattern that matches but always loses to a later one is not listed. With a ``prefix``
        only those are listed that speak of the module of that name: the others may be meant for
        the rest of the model.
        """
        known = list(dict.fromkeys(names))
        missing = self.patterns_without(known)
        return [UnmatchedPattern(pattern, nearest_names(pattern, known)) for pattern in missing]

    def patterns_without(self, names: Collection[str]) -> list[str]:
        """Return the patterns of :meth:`unmatched_patterns`, without names that are near."""
        return [
            rule.pattern
            for rule in self._rules
            if not any(rule.matches(name) for name in names) and rule.is_within(self.prefix)
        ]

    def fingerprint(self) -> str:
        """Return a hex SHA-256 of all fields, the same in every process for equal configs."""
        return self._fingerprint

    def fingerprint_for(self, names: Iterable[str]) -> str:
        """Return a hash of what these options mean to nodes of modules with those full names.

        It is the same for two layers that are compiled on their own and that ``modules`` treats
        alike, so that they can share a compiler's cache entries.
        """
        if not self.prefix:
            parts: tuple[object, ...] = (self.fingerprint(), *names)
        else:
            parts = (replace(self, modules={}, prefix="").fingerprint(), *map(self._local, names))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def treatment(self, names: Iterable[str]) -> str:
        """Return a hash of what the rules and the calibration make of modules of those names."""
        return hashlib.sha256(repr([*map(self._treated, names)]).encode()).hexdigest()

    def _local(self, name: str) -> tuple[object, ...]:
        """What the rules make of a module, without the name of what is compiled on its own."""
        return name.removeprefix(self.prefix), *self._treated(name)

    def _treated(self, name: str) -> tuple[object, ...]:
        resolved, opted_in = self.resolve(name), self.resolve(name, opt_in=True).enabled
        site = "" if self.calibration is None else self.calibration.site_fingerprint(name)
        kept = bool(resolved.kept_by_depth)
        return resolved.enabled, opted_in, kept, resolved.overrides, site

    def __eq__(self, other: object) -> bool:
        # Comparing the fields would call two orders of `modules` equal, and order decides there.
        if not isinstance(other, MXNormConfig):
            return NotImplemented
        return self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __reduce__(self) -> tuple[Callable[..., MXNormConfig], tuple[dict[str, Any]]]:
        # A mappingproxy can be neither pickled nor deep-copied.
        values = {name: getattr(self, name) for name in VALIDATORS}
        thawed = {"modules": _thaw_modules(self.modules), "num_layers": dict(self.num_layers)}
        return _rebuild, ({**values, **thawed},)

    def _winner(self, name: str) -> _Rule | None:
        return next((rule for rule in reversed(self._rules) if rule.matches(name)), None)

    def _resolve_uncached(self, name: str, opt_in: bool) -> ModuleConfig:
        resolved, winner = self._resolve_rules(name, opt_in), self._winner(name)
        recipe, place = resolved.config.recipe, place_of(name, self.num_layers)
        if recipe is None or not recipe.has_depth:
            return resolved
        if place is None:
            unknown = not self.num_layers or has_number(self.prefix)
            return replace(resolved, depth_unknown=unknown)
        if winner is not None and winner.chooses_recipe_of(place):
            return resolved
        return replace(resolved, kept_by_depth=kept_by_depth(place, recipe))

    def _resolve_rules(self, name: str, opt_in: bool) -> ModuleConfig:
        winner = self._winner(name)
        enabled = winner is None or winner.enabled
        component = name.rpartition(".")[2]
        if opt_in or component in HEAD_NAMES:
            enabled = enabled and winner is not None and component in winner.pattern
        config = self if winner is None else winner.config
        if self.calibration is None:
            return ModuleConfig(enabled, config)
        weights = self.calibration.weights.get(name)
        by_rule = winner is not None and winner.sets_estimator
        if by_rule and (config.estimator == "exact" or weights is None):
            return ModuleConfig(enabled, config)
        if weights is not None and (by_rule or name not in self.calibration.exact):
            return ModuleConfig(enabled, config, "block weights", weights)
        kept: Calibrated = "exact" if name in self.calibration.exact else "unknown"
        exact = replace(config, estimator="exact", calibration=None)
        return ModuleConfig(enabled, exact, kept)

    @cached_property
    def _resolved(self) -> dict[tuple[str, bool], ModuleConfig]:
        return {}

    @cached_property
    def _rules(self) -> tuple[_Rule, ...]:
        return tuple(_make_rule(self, pattern, value) for pattern, value in self.modules.items())

    @cached_property
    def _fingerprint(self) -> str:
        values: dict[str, object] = {name: getattr(self, name) for name in VALIDATORS}
        # A list, because the order of the rules is part of their meaning.
        values["modules"] = list(_thaw_modules(self.modules).items())
        values["calibration"] = self.calibration and self.calibration.fingerprint()
        text = json.dumps(values, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Rule:
    pattern: str
    regex: re.Pattern[str]
    enabled: bool
    config: MXNormConfig
    sets_estimator: bool
    sets_recipe: bool

    def matches(self, name: str) -> bool:
        return self.regex.fullmatch(name) is not None

    def chooses_recipe_of(self, place: Place) -> bool:
        """Does it set the recipe, and not in every layer alike?"""
        return self.sets_recipe and not all(map(self.matches, place.in_every_layer()))

    def is_within(self, prefix: str) -> bool:
        """Does the pattern begin, before any wildcard, with the name of that module?"""
        return not prefix or f"{self.pattern}.".startswith(f"{prefix}.")


def _check_agreement(config: MXNormConfig, calibration: Calibration) -> None:
    """The options must not ask for what the calibration was not fitted for."""
    if config.estimator == "exact":
        raise ValueError(
            "estimator='exact' and a calibration exclude each other: the exact RMS needs none. "
            "Leave one of them out, or set 'estimator' for some norms through `modules`"
        )
    asked = {"p": config.p} if config.p is not _DEFAULT_P else {}
    for pattern, rule in config.modules.items():
        if not isinstance(rule, bool) and "p" in rule:
            asked[f"modules[{pattern!r}]['p']"] = rule["p"]
    for label, p in asked.items():
        if p != calibration.p:
            allowed = f"{calibration.p:g}, for which the calibration was fitted, or none"
            raise invalid(label, p, allowed)


def _rebuild(values: dict[str, Any]) -> MXNormConfig:
    return MXNormConfig(**values)


def _thaw_modules(
    modules: Mapping[str, bool | Mapping[str, Any]],
) -> dict[str, bool | dict[str, Any]]:
    return {
        pattern: rule if isinstance(rule, bool) else dict(rule) for pattern, rule in modules.items()
    }


def _make_rule(base: MXNormConfig, pattern: str, value: bool | Mapping[str, Any]) -> _Rule:
    overrides = {} if isinstance(value, bool) else dict(value)
    if overrides.keys() & {"format", "elem_dtype", "scale_mode"}:
        overrides.setdefault("recipe", None)
    elif overrides.get("recipe") is not None:
        overrides |= {"format": "mxfp8", "scale_mode": DEFAULT_SCALE_MODE}
    # Either says what elements are, so that one of the base gives way.
    if "format" in overrides:
        overrides.setdefault("elem_dtype", DEFAULT_ELEM_DTYPE)
        if overrides["format"] == "nvfp4":
            overrides.setdefault("scale_mode", DEFAULT_SCALE_MODE)
    elif "elem_dtype" in overrides:
        overrides["format"] = "mxfp8"
    config = replace(base, calibration=None, **overrides) if overrides else base
    return _Rule(
        pattern,
        compile_pattern(pattern),
        value is not False,
        config,
        sets_estimator="estimator" in overrides,
        sets_recipe="recipe" in overrides,
    )
