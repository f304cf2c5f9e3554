"""Substitutions as JSON, so that a warm compile cache need not trace for them again.

Nodes are named as in Dynamo's graph, which is the same wherever the cache key is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import fx

from mxnorm_pass.passes.before_autograd.scopes import Scope
from mxnorm_pass.passes.before_autograd.substitution import Estimate, Substitution

_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def to_json(plan: Iterable[Substitution]) -> list[dict[str, Any]]:
    return [_entry(substitution) for substitution in plan]


def from_json(entries: Iterable[Mapping[str, Any]], scopes: Sequence[Scope]) -> list[Substitution]:
    """The substitutions, in the graphs of ``scopes``.

    Raises:
        KeyError, IndexError, TypeError: the entries are not of these graphs.
    """
    return [_substitution(entry, scopes) for entry in entries]


def _entry(substitution: Substitution) -> dict[str, Any]:
    entry = {f.name: _named(getattr(substitution, f.name)) for f in fields(substitution)}
    estimate = asdict(substitution.estimate)
    dtype = estimate["norm_dtype"]
    estimate["norm_dtype"] = None if dtype is None else str(dtype)
    return entry | {"scope": substitution.scope.number, "estimate": estimate}


def _named(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return value.name
    return [node.name for node in value] if isinstance(value, tuple) else None


def _substitution(entry: Mapping[str, Any], scopes: Sequence[Scope]) -> Substitution:
    scope = scopes[entry["scope"]]
    nodes = {node.name: node for node in scope.nodes}
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Substitution)):
        value = entry[name]
        if isinstance(value, list):
            values[name] = tuple(nodes[n] for n in value)
        elif name not in ("scope", "estimate"):
            values[name] = None if value is None else nodes[value]
    estimate = dict(entry["estimate"])
    dtype, weights = estimate["norm_dtype"], estimate["block_weights"]
    estimate["norm_dtype"] = None if dtype is None else _DTYPES[dtype]
    estimate["block_weights"] = None if weights is None else tuple(weights)
    return Substitution(**{**values, "scope": scope, "estimate": Estimate(**estimate)})
