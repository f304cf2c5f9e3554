"""Options of the ``mxnorm`` backend: validation, per-module rules, and the split from Inductor's.

This module is a leaf. It imports only other leaves, the standard library and torch.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from mxnorm_pass.formats import ScaleMode
from mxnorm_pass.inductor_options import (
    check_inductor_value,
    inductor_key,
    invalid,
    mode_options,
    one_of,
)

__all__ = [
    "Estimator",
    "Gain",
    "Gradient",
    "Inner",
    "MXNormConfig",
    "ModuleConfig",
    "ParsedOptions",
    "Quantize",
    "ScaleMode",
    "UnmatchedPattern",
    "parse_options",
]

Estimator = Literal["mxnorm", "exact"]
Gain = Literal["auto", "fold", "activation"]
Gradient = Literal["true", "orthogonal", "paper"]
Quantize = Literal["norm-fed", "existing", "all"]
Inner = Literal["inductor", "aot_eager", "eager"]

_Validator = Callable[[str, object], Any]

_REGEX_PREFIX = "re:"
_HEAD_NAMES = frozenset({"lm_head", "output"})
_ELEM_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_OVERRIDABLE = ("estimator", "p", "gain", "gradient", "elem_dtype", "scale_mode")


@dataclass(frozen=True)
class UnmatchedPattern:
    """A key of ``MXNormConfig.modules`` that matched no module name.

    Attributes:
        pattern: the key, as given.
        nearest: up to three of the names it was tried on, best first; empty only if there
            were no names.
    """

    pattern: str
    nearest: tuple[str, ...]


@dataclass(frozen=True)
class ModuleConfig:
    """What applies to one module.

    Attributes:
        enabled: whether the module may be rewritten at all.
        config: the base config with the winning rule's overrides applied. Meaningful only where
            ``enabled`` is true.
    """

    enabled: bool
    config: MXNormConfig

    @property
    def overrides(self) -> dict[str, str]:
        """The fields that rules may override, as text."""
        return {name: str(getattr(self.config, name)) for name in _OVERRIDABLE}


@dataclass(frozen=True)
class ParsedOptions:
    """``torch.compile``'s options, split by owner.

    Attributes:
        config: the fields of this package.
        inductor: overrides for ``torch._inductor.config``, under Inductor's own spelling
            ("max_autotune", "triton.cudagraphs"); pass them on as ``config_patches``.
    """

    config: MXNormConfig
    inductor: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MXNormConfig:
    """Every choice the backend makes, validated and immutable.

    The source of names and defaults is the contract table of the design document. Configs are
    equal, and hash alike, when their fields are equal and ``modules`` has the same order.

    Attributes:
        estimator: "mxnorm" (RMS estimated from the block scales) or "exact" (fused RMSNorm and
            cast with the true RMS).
        p: exponent of the estimator's power mean; any finite int or float above 0, kept as float.
        gain: "auto", "fold" or "activation": where the norm's weight is applied.
        gradient: "true", "orthogonal" or "paper".
        quantize: "norm-fed" (plain linears fed by a norm), "existing" (only casts already in the
            graph) or "all" (every linear).
        elem_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``, for casts that the backend
            inserts.
        scale_mode: "rceil", "floor", "ceil" or "even", for casts that the backend inserts.
        modules: name pattern to False, True or a dict of overrides of estimator, p, gain,
            gradient, elem_dtype and scale_mode. A pattern is a glob, or a regular expression
            after "re:"; see ``resolve``. Copied, so later changes to the caller's dict are unseen.
        calibration: None; calibration files are not supported by this version.
        inner: "inductor", "aot_eager" or "eager": what compiles the rewritten graph.
        freezing: Inductor's meaning: inference weights are folded and cast once.
        prefix: full name of the module that is compiled on its own ("model.layers.3"); it goes in
            front of the names of the modules inside, in ``modules`` and in reports.

    Raises:
        ValueError: a field has a wrong type or value. The message names the field, the value and
            what is allowed; for an override it also names the pattern.
    """

    estimator: Estimator = "mxnorm"
    p: float = 2.0
    gain: Gain = "auto"
    gradient: Gradient = "true"
    quantize: Quantize = "norm-fed"
    elem_dtype: torch.dtype = torch.float8_e4m3fn
    scale_mode: ScaleMode = "rceil"
    modules: Mapping[str, bool | Mapping[str, Any]] = field(default_factory=dict)
    calibration: None = None
    inner: Inner = "inductor"
    freezing: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        for name, validate in _VALIDATORS.items():
            object.__setattr__(self, name, validate(name, getattr(self, name)))

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
        return [
            UnmatchedPattern(rule.pattern, nearest_names(rule.pattern, known))
            for rule in self._rules
            if not any(rule.matches(name) for name in known) and rule.is_within(self.prefix)
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

    def _local(self, name: str) -> tuple[object, ...]:
        """What the rules make of a module, without the name of what is compiled on its own."""
        resolved, opted_in = self.resolve(name), self.resolve(name, opt_in=True).enabled
        return name.removeprefix(self.prefix), resolved.enabled, opted_in, resolved.overrides

    def __eq__(self, other: object) -> bool:
        # Comparing the fields would call two orders of `modules` equal, and order decides there.
        if not isinstance(other, MXNormConfig):
            return NotImplemented
        return self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __reduce__(self) -> tuple[Callable[..., MXNormConfig], tuple[dict[str, Any]]]:
        # A mappingproxy can be neither pickled nor deep-copied.
        values = {name: getattr(self, name) for name in _VALIDATORS}
        return _rebuild, ({**values, "modules": _thaw_modules(self.modules)},)

    def _winner(self, name: str) -> _Rule | None:
        return next((rule for rule in reversed(self._rules) if rule.matches(name)), None)

    def _resolve_uncached(self, name: str, opt_in: bool) -> ModuleConfig:
        winner = self._winner(name)
        enabled = winner is None or winner.enabled
        component = name.rpartition(".")[2]
        if opt_in or component in _HEAD_NAMES:
            enabled = enabled and winner is not None and component in winner.pattern
        return ModuleConfig(enabled, self if winner is None else winner.config)

    @cached_property
    def _resolved(self) -> dict[tuple[str, bool], ModuleConfig]:
        return {}

    @cached_property
    def _rules(self) -> tuple[_Rule, ...]:
        return tuple(_make_rule(self, pattern, value) for pattern, value in self.modules.items())

    @cached_property
    def _fingerprint(self) -> str:
        values: dict[str, object] = {name: getattr(self, name) for name in _VALIDATORS}
        # A list, because the order of the rules is part of their meaning.
        values["modules"] = list(_thaw_modules(self.modules).items())
        text = json.dumps(values, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Rule:
    pattern: str
    regex: re.Pattern[str]
    enabled: bool
    config: MXNormConfig

    def matches(self, name: str) -> bool:
        return self.regex.fullmatch(name) is not None

    def is_within(self, prefix: str) -> bool:
        """Does the pattern begin, before any wildcard, with the name of that module?"""
        return not prefix or f"{self.pattern}.".startswith(f"{prefix}.")


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> ParsedOptions:
    """Split ``torch.compile``'s flat options into this package's and Inductor's.

    Args:
        options: any field of ``MXNormConfig``, and any key of ``torch._inductor.config`` (nested
            ones as "triton.cudagraphs"; "-" and "_" are the same, as in torch). None is {}.
        mode: a name of ``torch._inductor.list_mode_options()``, or None. Explicit options win
            over the mode's.

    Returns:
        The config and Inductor's overrides. ``freezing`` belongs to both; it is among Inductor's
        only when True.

    Raises:
        ValueError: ``options`` is not a mapping; a key belongs to neither (the message names the
            nearest valid one); a value is wrong for its field or Inductor key; unknown ``mode``.
    """
    own: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in [*mode_options(mode).items(), *_as_mapping(options).items()]:
        if isinstance(key, str) and key in _VALIDATORS:
            own[key] = value
        else:
            spelled = inductor_key(key, _VALIDATORS)
            check_inductor_value(key, spelled, value)
            inductor[spelled] = value
    config = MXNormConfig(**own)
    if config.freezing:
        inductor["freezing"] = True
    return ParsedOptions(config, inductor)


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


def _validate_calibration(label: str, value: object) -> None:
    if value is not None:
        reason = "calibration files are not supported by this version; leave it None"
        raise invalid(label, value, f"None: {reason}")


def _validate_modules(label: str, value: object) -> Mapping[str, bool | Mapping[str, Any]]:
    if not isinstance(value, Mapping):
        raise invalid(label, value, "a mapping from name pattern to True, False or a dict")
    rules: dict[str, bool | Mapping[str, Any]] = {}
    for pattern, rule in value.items():
        _check_pattern(label, pattern)
        rules[pattern] = _validate_rule(f"{label}[{pattern!r}]", rule)
    return types.MappingProxyType(rules)


def _check_pattern(label: str, pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(
            f"{label} has the key {pattern!r}, which is not valid: expected a non-empty str, "
            f"a glob or a regular expression after {_REGEX_PREFIX!r}"
        )
    try:
        compile_pattern(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{label} has the key {pattern!r}, which is not valid: expected a regular expression "
            f"after {_REGEX_PREFIX!r}, but it does not compile: {error}"
        ) from error


def _validate_rule(label: str, rule: object) -> bool | Mapping[str, Any]:
    if isinstance(rule, bool):
        return rule
    if not isinstance(rule, Mapping):
        allowed = f"True, False or a dict of overrides, with keys {one_of(_OVERRIDABLE)}"
        raise invalid(label, rule, allowed)
    return types.MappingProxyType(
        {name: _validate_override(label, name, value) for name, value in rule.items()}
    )


def _validate_override(label: str, name: object, value: object) -> Any:
    if not isinstance(name, str) or name not in _OVERRIDABLE:
        raise ValueError(
            f"{label} overrides {name!r} (with {value!r}), which cannot be set per module: "
            f"expected {one_of(_OVERRIDABLE)}"
        )
    return _VALIDATORS[name](f"{label}[{name!r}]", value)


_VALIDATORS: dict[str, _Validator] = {
    "estimator": _choice(Estimator),
    "p": _validate_p,
    "gain": _choice(Gain),
    "gradient": _choice(Gradient),
    "quantize": _choice(Quantize),
    "elem_dtype": _validate_elem_dtype,
    "scale_mode": _choice(ScaleMode),
    "modules": _validate_modules,
    "calibration": _validate_calibration,
    "inner": _choice(Inner),
    "freezing": _validate_bool,
    "prefix": _validate_prefix,
}


def _rebuild(values: dict[str, Any]) -> MXNormConfig:
    return MXNormConfig(**values)


def _thaw_modules(
    modules: Mapping[str, bool | Mapping[str, Any]],
) -> dict[str, bool | dict[str, Any]]:
    return {
        pattern: rule if isinstance(rule, bool) else dict(rule) for pattern, rule in modules.items()
    }


def compile_pattern(pattern: str) -> re.Pattern[str]:
    if pattern.startswith(_REGEX_PREFIX):
        return re.compile(pattern.removeprefix(_REGEX_PREFIX))
    return re.compile(fnmatch.translate(pattern))


def _make_rule(base: MXNormConfig, pattern: str, value: bool | Mapping[str, Any]) -> _Rule:
    overrides = {} if isinstance(value, bool) else value
    config = replace(base, **overrides) if overrides else base
    return _Rule(pattern, compile_pattern(pattern), value is not False, config)


def nearest_names(pattern: str, names: list[str]) -> tuple[str, ...]:
    # A regex's escapes would count against every name.
    text = pattern.removeprefix(_REGEX_PREFIX).replace("\\", "")
    close = difflib.get_close_matches(text, names, n=3)
    return tuple(close or difflib.get_close_matches(text, names, n=1, cutoff=0.0))


def _as_mapping(options: object) -> Mapping[Any, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise invalid("options", options, "a mapping from option name to value, or None")
    return options
