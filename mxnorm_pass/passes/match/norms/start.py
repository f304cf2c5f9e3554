"""Where the matching of a norm starts: nodes that hold one number per row, and what it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import aten, is_call, is_view, same_size, strip, tensor_of
from mxnorm_pass.passes.match.norms.inverse_rms import Statistic

_MEANS = frozenset({aten.mean.dim})
_SUMS = frozenset({aten.sum.dim_IntList})
_VECTOR_NORMS = frozenset({aten.linalg_vector_norm.default})


@dataclass(frozen=True)
class Start:
    """A node that sums the squares of a tensor.

    Attributes:
        statistic: what the node holds.
        squared: the tensor.
        squares: the node of its squares, None where the op squares by itself.
        shape: of what is summed.
        dims: over which it is.
        count: how many elements they have, as far as that is no symbol.
    """

    statistic: Statistic
    squared: fx.Node
    squares: fx.Node | None
    shape: tuple[Any, ...]
    dims: tuple[int, ...]
    count: int

    @property
    def is_mean(self) -> bool:
        return self.statistic.node.target in _MEANS


def find_start(node: fx.Node) -> Start | None:
    """What a forward node starts, None if it holds no such number."""
    if node.target is ops.inverse_rms:
        return _estimate(node)
    if not is_call(node, _MEANS | _SUMS | _VECTOR_NORMS) or tensor_of(node) is None:
        return None
    reduced = node.args[0]
    dims_position = 2 if node.target in _VECTOR_NORMS else 1
    dims = node.args[dims_position] if len(node.args) > dims_position else None
    source = tensor_of(reduced) if isinstance(reduced, fx.Node) else None
    if source is None or not isinstance(dims, (list, tuple)) or not dims:
        return None
    dims = tuple(sorted(int(d) % source.ndim for d in dims))
    dims = tuple(d for d in dims if not same_size(source.shape[d], 1)) or dims
    count = math.prod(s for s in (source.shape[d] for d in dims) if isinstance(s, int))
    if node.target in _VECTOR_NORMS:
        order = node.args[1] if len(node.args) > 1 else 2
        squared = reduced if order == 2 else None
        squares = None
    else:
        squares = strip(reduced, is_view)  # type: ignore[arg-type]
        squared = _squared(squares)
    if not isinstance(squared, fx.Node):
        return None
    statistic = Statistic(
        node,
        scale=1 / count if node.target in _MEANS else 1.0,
        eps=0.0,
        power=0.5 if node.target in _VECTOR_NORMS else 1.0,
        trail=(node,),
    )
    return Start(statistic, squared, squares, tuple(source.shape), dims, count)


def _estimate(node: fx.Node) -> Start:
    """1 / rms by estimate, as if it came from a sum of squares."""
    x, _, eps, *_ = node.args
    value = tensor_of(x)  # type: ignore[arg-type]
    assert value is not None
    width, last = value.shape[-1], value.ndim - 1
    statistic = Statistic(node, scale=1 / width, eps=eps, power=-0.5, trail=(node,))  # type: ignore[arg-type]
    return Start(statistic, x, None, tuple(value.shape), (last,), width)  # type: ignore[arg-type]


def _squared(node: fx.Node) -> fx.Node | None:
    """z where the node is z^2."""
    if is_call(node, (aten.pow.Tensor_Scalar,)) and node.args[1] in (2, 2.0):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if is_call(node, (aten.square.default,)):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if is_call(node, (aten.mul.Tensor,)) and node.args[0] is node.args[1]:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    return None
