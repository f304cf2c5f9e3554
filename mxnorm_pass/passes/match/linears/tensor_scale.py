"""Who reads the scale of a tensor, beside the cast that it belongs to."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.matmul import is_matmul
from mxnorm_pass.graph.nodes import aten, is_call, is_dtype_cast, is_view, strip, tensor_of
from mxnorm_pass.passes.match.casts.find import Cast


def readers_beside(cast: Cast) -> list[fx.Node]:
    """The readers of its tensor's scale outside of the cast."""
    assert cast.tensor_scale is not None
    return [user for user in cast.tensor_scale.users if user not in cast.nodes]


def other_reader(cast: Cast, matmuls: Collection[fx.Node]) -> fx.Node | None:
    """One that does not just scale what the cast's own matmuls give; None without such.

    ``_scaled_mm`` leaves the tensors' scales to the graph, which multiplies the result by their
    product. Another scale can take the place of one of which nothing else is made.
    """
    if cast.tensor_scale is None:
        return None
    pending = [(cast.tensor_scale, user) for user in readers_beside(cast)]
    while pending:
        scale, user = pending.pop()
        if user.target is ops.dequantize and user.args[0] is cast.values:
            continue
        value = tensor_of(user)
        multiplies = is_call(user, (aten.mul.Tensor,))
        if value is not None and value.ndim == 0 and (multiplies or _keeps_value(user)):
            pending += [(user, reader) for reader in user.users]
        elif not multiplies or not _scales_a_result(user, scale, matmuls):
            return user
    return None


def _keeps_value(node: fx.Node) -> bool:
    return is_view(node) or is_dtype_cast(node)


def _scales_a_result(node: fx.Node, scale: fx.Node, matmuls: Collection[fx.Node]) -> bool:
    others = [arg for arg in node.args if arg is not scale]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return False
    result = strip(others[0], is_view, is_dtype_cast)
    return is_matmul(result) and result in matmuls
