"""Tell what ends in a linear or a cast from what is divided by a norm for other ends."""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from mxnorm_pass.graph_utils import aten, is_call, tensor_of
from mxnorm_pass.match.constant import constant_of
from mxnorm_pass.match.linear import CastIndex, plain_linear, readers
from mxnorm_pass.match.statistic import FACTORS, is_per_channel


def feeds_linear_or_cast(node: fx.Node, casts: CastIndex, unknown: Container[fx.Node]) -> bool:
    """Does a linear or a cast read the node, be it through views, dtypes, gains or numbers?

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
            if _scales(reader.node, end):
                pending.append(reader.node)
    return False


def _scales(product: fx.Node, node: fx.Node) -> bool:
    """Does it multiply or divide the node by a gain or a number?"""
    if not is_call(product, FACTORS):
        return is_call(product, (aten.neg.default,))
    first, second = product.args[:2]
    factor = second if first is node else first
    value, own = (tensor_of(n) if isinstance(n, fx.Node) else None for n in (factor, node))
    if constant_of(factor) is not None or (value is not None and value.numel() == 1):
        return True
    return own is not None and own.ndim > 1 and is_per_channel(factor, own.shape[-1])
