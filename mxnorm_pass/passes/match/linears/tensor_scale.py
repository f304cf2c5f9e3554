"""Who reads the scale of a tensor, beside the cast that it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import (
    ancestors_after,
    aten,
    is_backward,
    is_call,
    is_dtype_cast,
    is_view,
    tensor_of,
)
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.linears.products import QuantizedMatmul, cast_use

# Products without anything added. Others take a bias at this position.
_BARE = frozenset({aten.mm.default, aten.bmm.default, aten.matmul.default})
_BIAS: dict[Any, int] = {aten.linear.default: 2, aten._scaled_mm.default: 4}


def readers_beside(cast: Cast) -> list[fx.Node]:
    """The readers of its tensor's scale outside of the cast."""
    assert cast.tensor_scale is not None
    return [user for user in cast.tensor_scale.users if user not in cast.nodes]


def not_only_scaled_by(cast: Cast, linears: Collection[QuantizedMatmul]) -> fx.Node | None:
    """A node that keeps another number from taking the place of the tensor's scale.

    ``_scaled_mm`` leaves the tensors' scales to the graph, which multiplies the result by their
    product. If each matmul of the cast is scaled once, by ``dequantize`` or afterwards, and
    nothing else reads the scale or the cast, another one gives what it gives with another cast.

    Args:
        linears: those of the cast that are to read another one.
    """
    scale = cast.tensor_scale
    if scale is None:
        return None
    if (reader := _backward_reader(cast, linears)) is not None:
        return reader
    squares = {linear.matmul for linear in linears if _multiplies_itself(cast, linear)}
    scaled: Counter[fx.Node] = Counter()
    pending = [(scale, user) for user in readers_beside(cast)]
    while pending:
        source, user = pending.pop()
        value = tensor_of(user)
        if user.target is ops.dequantize and user.args[0] is cast.values:
            scaled.update(linear.matmul for linear in linears if user in linear.slice)
        elif value is not None and value.ndim == 0 and _scales_once(user, source, scale):
            pending += [(user, reader) for reader in user.users]
        else:
            matmul = _scaled_result(user, source)
            if matmul is None or matmul in squares:
                return user
            scaled[matmul] += 1
    of_cast = {use.matmul for use in cast_use(cast).matmuls}
    rescaled = of_cast & {linear.matmul for linear in linears}
    wrong = [n for n in {*of_cast, *scaled} if n not in rescaled or scaled[n] != 1]
    return min(wrong, default=None)


def _backward_reader(cast: Cast, linears: Collection[QuantizedMatmul]) -> fx.Node | None:
    """The first backward reader of the cast: whose scale it goes with nothing says."""
    held = {cast.values, cast.scales, *(node for linear in linears for node in linear.slice)}
    return min((user for node in held for user in node.users if is_backward(user)), default=None)


def _multiplies_itself(cast: Cast, linear: QuantizedMatmul) -> bool:
    """Does the tensor's scale count twice, as in X Xᵀ?"""
    values = {cast.values, *linear.slice} - linear.of_scales
    return sum(arg in values for arg in linear.matmul.args if isinstance(arg, fx.Node)) > 1


def _scales_once(node: fx.Node, source: fx.Node, scale: fx.Node) -> bool:
    """Is a number the source, maybe times one that the scale has no part in?"""
    if is_view(node) or is_dtype_cast(node):
        return True
    if not is_call(node, (aten.mul.Tensor,)):
        return False
    others = [arg for arg in node.args if arg is not source]
    return len(others) == 1 and not (
        isinstance(others[0], fx.Node) and scale in ancestors_after(others[0], scale)
    )


def _scaled_result(node: fx.Node, scale: fx.Node) -> fx.Node | None:
    """The matmul of which nothing but this product with the scale is read."""
    others = [arg for arg in node.args if arg is not scale]
    if not is_call(node, (aten.mul.Tensor,)) or len(others) != 1:
        return None
    result: Any = others[0]
    if not isinstance(result, fx.Node):
        return None
    while len(result.users) == 1 and (is_view(result) or is_dtype_cast(result)):
        result = result.args[0]
    return result if len(result.users) == 1 and _adds_nothing(result) else None


def _adds_nothing(node: fx.Node) -> bool:
    if is_call(node, _BARE):
        return True
    position = _BIAS.get(node.target)
    if node.op != "call_function" or position is None or node.kwargs.get("bias") is not None:
        return False
    return len(node.args) <= position or node.args[position] is None
