"""Which ops multiply matrices, and which of their operands is a linear's activation."""

from __future__ import annotations

from typing import Any

from torch import fx

from mxnorm_pass.graph_utils import aten, is_call

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
# Position of activation and weight among the operands.
LINEAR_OPERANDS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.matmul.default: (0, 1),
    aten.linear.default: (0, 1),
}


def is_matmul(node: fx.Node) -> bool:
    return is_call(node, _MATMULS)
