"""Find LayerNorms: they subtract the mean, which MXNorm does not estimate."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from torch import fx

from mxnorm_pass.graph_utils import (
    aten,
    is_backward,
    is_call,
    is_dtype_cast,
    is_expand,
    is_view,
    same_value,
    strip,
    tensor_of,
)
from mxnorm_pass.match.statistic import Statistic, follow
from mxnorm_pass.module_names import module_path

_FUSED = frozenset({aten.native_layer_norm.default, aten.layer_norm.default})
_VAR_MEANS = frozenset({aten.var_mean.correction})
_VARIANCES = frozenset({aten.var.correction, *_VAR_MEANS})
_MEANS = frozenset({aten.mean.dim})


@dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm over the last dimension; ``anchor`` is the node it was found by."""

    name: str
    anchor: fx.Node


def find_layer_norms(graph: fx.Graph) -> list[LayerNorm]:
    """All LayerNorms of the forward graph that take a variance, in graph order.

    Those that square x - mean(x) are found as RMSNorms of it, see :func:`is_centered`.
    """
    return [
        LayerNorm(module_path(node) or node.name, node)
        for node in graph.nodes
        if node.op == "call_function"
        and not is_backward(node)
        and (node.target in _FUSED or _divides_by_deviation(node))
    ]


def is_centered(node: fx.Node) -> bool:
    """Does the node hold x - mean(x), the mean over the last dimension?"""
    node = strip(node, is_view, is_dtype_cast)
    if not is_call(node, (aten.sub.Tensor,)) or node.kwargs:
        return False
    x, mean = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node):
        return False
    source = _mean_of(strip(mean, is_view, is_dtype_cast, is_expand))
    return source is not None and same_value(source, strip(x, is_view, is_dtype_cast))


def _divides_by_deviation(variance: fx.Node) -> bool:
    if not is_call(variance, _VARIANCES) or not _over_last_dimension(variance):
        return False
    values = [variance]
    if variance.target in _VAR_MEANS:
        values = [user for user in variance.users if user.args[1] == 0]
    for value in values:
        start = Statistic(value, scale=1.0, eps=0.0, power=1.0, trail=(value,))
        for statistic, user in follow(start):
            others = [n for n in user.all_input_nodes if n is not statistic.node]
            if math.isclose(abs(statistic.power), 0.5) and any(map(is_centered, others)):
                return True
    return False


def _mean_of(node: fx.Node) -> fx.Node | None:
    """The tensor whose mean over the last dimension the node holds."""
    if is_call(node, (operator.getitem,)) and node.args[1] == 1:
        node = node.args[0]  # type: ignore[assignment]
        if not is_call(node, _VAR_MEANS):
            return None
    elif not is_call(node, _MEANS):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or not _over_last_dimension(node):
        return None
    return strip(source, is_view, is_dtype_cast)


def _over_last_dimension(reduction: fx.Node) -> bool:
    source = reduction.args[0]
    value = tensor_of(source) if isinstance(source, fx.Node) else None
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    if value is None or not isinstance(dims, (list, tuple)):
        return False
    return [int(d) % value.ndim for d in dims] == [value.ndim - 1]
