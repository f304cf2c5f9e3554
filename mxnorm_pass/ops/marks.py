"""The op that marks a place of Dynamo's graph in the graph that is traced from it."""

from __future__ import annotations

from torch import Tensor, fx

from mxnorm_pass.ops.define import Op, define


def _do_nothing(values: list[Tensor], scope: int, position: int) -> None:
    return


mark = define(
    Op(
        "mark(Tensor[] values, int scope, int position) -> ()",
        _do_nothing,
        _do_nothing,
        traffic="none",
        differentiable=True,
    )
)
# Without results it would be dead code.
fx.node.has_side_effect(mark)
