"""Find the residual add that a norm's fused op can do on its way.

The op then writes the sum for all others who read it, so that nothing is lost by fusing it, as long
as the add is one that the op can repeat, and the sum is due where the norm is: a checkpointed
layer is recomputed by itself and must not recompute the layer before it for its sum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, fx

from mxnorm_pass.graph.nodes import (
    ancestors_after,
    aten,
    is_call,
    partition_of,
    same_shape,
    tensor_of,
)
from mxnorm_pass.passes.match.norms.find import Norm


def residual_add(
    norm: Norm, inputs: Iterable[fx.Node], taken: Collection[fx.Node]
) -> fx.Node | None:
    """The add that gives ``norm`` its x, if the norm's op can do it; else None.

    Args:
        inputs: what else the op reads.
        taken: the adds that go to other norms.
    """
    add = norm.x
    if add in taken or not _is_plain_add(add):
        return None
    if any(partition_of(add) != partition_of(node) for node in (norm.anchor, norm.output)):
        return None
    # The sum will wait for all that the op reads.
    sums = {add, *taken}
    if any(sums & ancestors_after(node, min(sums)) for node in inputs):
        return None
    return add


def _is_plain_add(node: fx.Node) -> bool:
    """Is it the sum of two tensors of its own shape, contiguous and of floating point?"""
    total = tensor_of(node)
    if total is None or not is_call(node, (aten.add.Tensor,)):
        return False
    if node.kwargs.get("alpha", 1) != 1 or not total.dtype.is_floating_point:
        return False
    operands = [tensor_of(arg) if isinstance(arg, fx.Node) else None for arg in node.args]
    return all(_matches(value, total) for value in operands) and _is_contiguous(total)


def _matches(operand: Tensor | None, total: Tensor) -> bool:
    return (
        operand is not None
        and operand.dtype.is_floating_point
        and operand.device == total.device
        and same_shape(operand.shape, total.shape)
    )


def _is_contiguous(value: Tensor) -> bool:
    """Without a guard on symbolic sizes."""
    return same_shape(value.stride(), value.new_empty(value.shape).stride())
