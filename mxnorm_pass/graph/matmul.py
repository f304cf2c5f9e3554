"""Which ops multiply matrices or more, and which operand is a linear's activation."""

from __future__ import annotations

from typing import Any

from torch import fx

from mxnorm_pass.graph.nodes import aten, is_call

_MATMULS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
        aten.linear.default,
        aten._scaled_mm.default,
        aten._scaled_mm_v2.default,
    }
)
_PRODUCTS = ("attention", "grouped_mm", "convolution")
# Position of activation and weight among the operands.
LINEAR_OPERANDS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.matmul.default: (0, 1),
    aten.linear.default: (0, 1),
}

# In the meta of a linear's matmul: its key, and whether its backward cannot be told from others.
LINEAR_KEY = "mxnorm_linear"
UNREACHED = "mxnorm_unreached"


def is_matmul(node: fx.Node) -> bool:
    return is_call(node, _MATMULS)


def is_product(node: fx.Node) -> bool:
    """Does it multiply matrices, or attend, convolve or run experts?"""
    return (
        is_matmul(node)
        or is_call(node, (aten.mv.default,))
        or any(name in str(node.target) for name in _PRODUCTS)
    )
