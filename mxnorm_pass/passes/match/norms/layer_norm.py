"""Find LayerNorms: they subtract the mean, which MXNorm does not estimate."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import (
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

_FUSED = frozenset({aten.native_layer_norm.default, aten.layer_norm.default})
_VAR_MEANS = frozenset({aten.var_mean.correction})
_MEANS = frozenset({aten.mean.dim})


@dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm over the last dimension; ``anchor`` is the node it was found by."""

    name: str
    anchor: fx.Node


def find_layer_norms(graph: fx.Graph) -> list[LayerNorm]:
    """All LayerNorms of the forward graph that are one op, in graph order.

    Those that divide x - mean(x) by its norm are found as norms of it, see :func:`centered`.
    """
    return [
        LayerNorm(module_path(node) or node.name, node)
        for node in graph.nodes
        if is_call(node, _FUSED) and not is_backward(node)
    ]


def centered(node: fx.Node) -> fx.Node | None:
    """x where the node holds x - mean(x), the mean over the last dimension."""
    node = strip(node, is_view, is_dtype_cast)
    if not is_call(node, (aten.sub.Tensor,)) or node.kwargs:
        return None
    x, mean = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node):
        return None
    source = _mean_of(strip(mean, is_view, is_dtype_cast, is_expand))
    if source is None or not same_value(source, strip(x, is_view, is_dtype_cast)):
        return None
    return x


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
