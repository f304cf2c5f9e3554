"""Tell what ends in a linear or a cast from what is divided by a norm for other ends."""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from mxnorm_pass.graph.constants import constant_of
from mxnorm_pass.graph.nodes import aten, is_call, same_size, tensor_of
from mxnorm_pass.passes.match.linears.plain import plain_linear
from mxnorm_pass.passes.match.linears.readers import CastIndex, readers
from mxnorm_pass.passes.match.norms.inverse_rms import FACTORS, is_per_channel

# As they keep the quotient of a small row from being too large, or none.
_GUARDS = frozenset(
    {
        aten.neg.default,
        aten.where.self,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.nan_to_num.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
    }
)


def feeds_linear_or_cast(node: fx.Node, casts: CastIndex, unknown: Container[fx.Node]) -> bool:
    """Does a linear or a cast read the node, be it through views, dtypes, gains, numbers or guards?

    Args:
        unknown: sources of casts that were not recognised.
    """
    pending = [node]
    while pending:
        node = pending.pop()
        for reader in readers(node, casts):
            end = reader.path[-1] if reader.path else node
            linear = plain_linear(reader.node)
            if linear is not None and linear.activation is end:
                return True
            if reader.cast is not None or end in unknown:
                return True
            if _passes_on(reader.node, end):
                pending.append(reader.node)
    return False


def _passes_on(reader: fx.Node, node: fx.Node) -> bool:
    """Does it scale the node's rows or channels, or replace some of its elements?"""
    if not is_call(reader, FACTORS):
        return is_call(reader, _GUARDS)
    first, second = reader.args[:2]
    factor = second if first is node else first
    value, own = (tensor_of(n) if isinstance(n, fx.Node) else None for n in (factor, node))
    if value is None or own is None or own.ndim < 2:
        return constant_of(factor) is not None
    if value.ndim == 0 or same_size(value.shape[-1], 1):
        return True
    return is_per_channel(factor, own.shape[-1])
