"""Compile the layers of a model one by one, each under its full name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mxnorm_pass.errors import MXNormWarning
from mxnorm_pass.names import clean_module_path, compile_pattern, nearest_names
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.inductor import mode_options
from mxnorm_pass.options.parse import parse


def compile_layers(
    model: nn.Module,
    pattern: str,
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **compile_arguments: Any,
) -> tuple[str, ...]:
    """Compile every submodule whose name matches, in place and each by itself.

    ``modules`` in ``options`` selects by the names that the layers have in the model, and reports
    show them. Layers that ``modules`` treats alike share Inductor's cache entries::

        mxnorm_pass.compile_layers(model, "model.layers.*", options={"modules": {...}})

    Args:
        pattern: glob, or a regular expression after "re:"; of nested matches the outermost counts.
        options, mode: as for ``torch.compile``; ``prefix`` is the name of ``model`` itself.
        compile_arguments: further arguments of ``torch.compile``, such as ``fullgraph``.

    Returns:
        The names of the compiled submodules.

    Raises:
        ValueError: nothing matches, or an option is unknown or has a wrong value.
    """
    given = {**mode_options(mode), **(options or {})}
    config = parse(given).config
    if config.calibration is not None:
        given["calibration"] = config.calibration  # the file is read once
    names = _names(model, config.prefix)
    # A layer on its own does not show how many there are.
    kinds = {name: type(module).__name__ for name, module in names.items()}
    given["num_layers"] = dict(config.with_layers_of(kinds).num_layers)
    layers = _outermost_matches(names, pattern)
    _warn_rules_without_effect(config, names, layers)
    arguments = {**_isolation(), **compile_arguments}
    for name in layers:
        names[name].compile(backend="mxnorm", options={**given, "prefix": name}, **arguments)
    return layers


def _names(model: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The submodules by name, parents first."""
    named = ((clean_module_path(f"{prefix}.{n}"), m) for n, m in model.named_modules())
    return {name: module for name, module in named if name != prefix}


def _outermost_matches(names: Mapping[str, nn.Module], pattern: str) -> tuple[str, ...]:
    regex = compile_pattern(pattern)
    found: list[str] = []
    for name, module in names.items():
        # A container such as nn.ModuleList is never called.
        is_called = type(module).forward is not nn.Module.forward
        if is_called and regex.fullmatch(name) and not any(_is_inside(name, f) for f in found):
            found.append(name)
    if not found:
        nearest = ", ".join(nearest_names(pattern, list(names))) or "none"
        raise ValueError(f"no submodule's name matches {pattern!r}; nearest names: {nearest}")
    return tuple(found)


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _warn_rules_without_effect(
    config: MXNormConfig, names: Mapping[str, nn.Module], layers: tuple[str, ...]
) -> None:
    weights = [f"{name}.{own}" for name, m in names.items() for own in m._parameters]
    inside = [n for n in (*names, *weights) if any(_is_inside(n, layer) for layer in layers)]
    for unmatched in replace(config, prefix="").unmatched_patterns(inside):
        nearest = ", ".join(unmatched.nearest)
        warnings.warn(
            f"mxnorm: the pattern {unmatched.pattern!r} in `modules` matches nothing in the "
            f"layers that are compiled; nearest names: {nearest}",
            MXNormWarning,
            stacklevel=3,
        )


def _isolation() -> dict[str, bool]:
    """Have Dynamo count the compiles of each layer apart: together they would pass its limit."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
