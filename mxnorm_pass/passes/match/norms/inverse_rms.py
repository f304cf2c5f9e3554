"""Follow one number per row, such as a mean of squares, through the arithmetic done to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from mxnorm_pass.graph.constants import constant_of
from mxnorm_pass.graph.nodes import (
    aten,
    forward_users,
    is_call,
    is_dtype_cast,
    is_view,
    same_size,
    tensor_of,
)

ADDS = frozenset({aten.add.Tensor, aten.add.Scalar})
MULTIPLICATIONS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar})
FACTORS = MULTIPLICATIONS | DIVISIONS
_POWER_OF = {
    aten.sqrt.default: 0.5,
    aten.rsqrt.default: -0.5,
    aten.reciprocal.default: -1.0,
}


@dataclass(frozen=True)
class Statistic:
    """A node that holds (scale * s + eps) ^ power, one number per row; s is where it started.

    Attributes:
        trail: the nodes from the start (included) to ``node`` (included).
        gain: [D], by which each row's number was multiplied last; ``node`` is then [..., D].
        eps_outside_root: the node that adds something after the power.
        eps_input: what was added is this tensor and no constant.
        rounded: it passed through a narrower dtype.
    """

    node: fx.Node
    scale: float
    eps: float
    power: float
    trail: tuple[fx.Node, ...]
    gain: fx.Node | None = None
    eps_outside_root: fx.Node | None = None
    eps_input: fx.Node | None = None
    rounded: bool = False

    @property
    def per_row(self) -> fx.Node:
        """The last node of the trail with one number per row."""
        if self.gain is None:
            return self.node
        return next(a for a, b in pairwise(self.trail) if self.gain in b.args)

    def last(self, targets: frozenset[Any]) -> fx.Node:
        """The trail's last call of one of the ops, else its start."""
        return next((n for n in reversed(self.trail) if n.target in targets), self.trail[0])


def follow(start: Statistic) -> Iterator[tuple[Statistic, fx.Node]]:
    """Every statistic that the forward graph computes from ``start``, with each of its users."""
    pending = [start]
    seen: set[fx.Node] = set()
    while pending:
        statistic = pending.pop()
        if statistic.node in seen:
            continue
        seen.add(statistic.node)
        for user in forward_users(statistic.node):
            yield statistic, user
            pending += _next_statistic(statistic, user)


def is_narrowing(cast: fx.Node) -> bool:
    """Does a dtype cast lose range or precision?"""
    source, result = tensor_of(cast.args[0]), tensor_of(cast)  # type: ignore[arg-type]
    assert source is not None and result is not None
    before, after = torch.finfo(source.dtype), torch.finfo(result.dtype)
    return after.max < before.max or after.eps > before.eps


def _next_statistic(s: Statistic, user: fx.Node) -> Iterator[Statistic]:
    onward = replace(s, node=user, trail=(*s.trail, user))
    if is_view(user) or is_call(user, (aten.expand.default,)):
        yield onward
    elif is_dtype_cast(user):
        yield replace(onward, rounded=s.rounded or is_narrowing(user))
    elif s.gain is not None:
        return
    elif user.target in _POWER_OF:
        yield replace(onward, power=s.power * _POWER_OF[user.target])
    elif is_call(user, (aten.pow.Tensor_Scalar,)) and isinstance(user.args[1], (int, float)):
        yield replace(onward, power=s.power * user.args[1])
    elif is_call(user, ADDS | FACTORS):
        yield from _arithmetic(s, user, onward)


def _arithmetic(s: Statistic, user: fx.Node, onward: Statistic) -> Iterator[Statistic]:
    first, second = user.args[:2]
    other = second if first is s.node else first
    constant = constant_of(other)
    if user.kwargs.get("alpha", 1) != 1:
        return
    if constant is None:
        if user.target in ADDS and _is_scalar_tensor(other):
            yield replace(onward, eps_input=other)  # type: ignore[arg-type]
        elif user.target is aten.mul.Tensor and _spreads_over_channels(s.node, other):
            yield replace(onward, gain=other)  # type: ignore[arg-type]
        return
    if user.target in ADDS:
        if s.power == 1.0:
            yield replace(onward, eps=s.eps + constant)
        elif constant != 0:
            yield replace(onward, eps_outside_root=user)
        return
    if user.target in DIVISIONS and first is not s.node:
        onward = replace(onward, power=-s.power)
    elif user.target in DIVISIONS:
        constant = 1 / constant if constant else 0.0
    if constant > 0:
        factor = constant ** (1 / onward.power)
        yield replace(onward, scale=s.scale * factor, eps=s.eps * factor)


def is_per_channel(factor: object, width: object) -> bool:
    """Is the tensor as wide as a row, and the same for each row?"""
    value = tensor_of(factor) if isinstance(factor, fx.Node) else None
    if value is None or value.ndim == 0 or not same_size(value.shape[-1], width):
        return False
    return all(isinstance(s, int) and s == 1 for s in value.shape[:-1])


def _spreads_over_channels(statistic: fx.Node, other: object) -> bool:
    own, value = tensor_of(statistic), tensor_of(other) if isinstance(other, fx.Node) else None
    if own is None or value is None or not own.ndim or not same_size(own.shape[-1], 1):
        return False
    return is_per_channel(other, value.shape[-1] if value.ndim else None)


def _is_scalar_tensor(arg: object) -> bool:
    value = tensor_of(arg) if isinstance(arg, fx.Node) else None
    return value is not None and value.ndim == 0
