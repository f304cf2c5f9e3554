"""Let a norm's op do the residual add in front of it, in one pass over memory.

Before::

    x, residual -> add -> norm_cast -> values, scales, rho
                    +---> all that reads the sum

After::

    x, residual -> add_norm_cast -> values, scales, rho
                    +---> total -> all that reads the sum

Which adds may be fused is decided in ``match.residual_add``.
"""

from __future__ import annotations

import operator

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import copy_origin
from mxnorm_pass.graph.nodes import ancestors_after


def fuse_residual_add(graph: fx.Graph, op: fx.Node, add: fx.Node) -> None:
    """Replace ``op``, a norm's op on the sum ``add``, by one that adds first.

    The node of the sum stays and becomes the new op's first result: whoever knows it need not be
    told.
    """
    _, *others = op.args
    late = sorted(
        n for arg in others if isinstance(arg, fx.Node) for n in ancestors_after(arg, add)
    )
    for node in dict.fromkeys(late):
        # Such as a gain of 1 + w, which the model computes after the sum.
        add.prepend(node)
    with graph.inserting_before(add):
        fused = graph.call_function(ops.OPS[op.target].add_first, (*add.args, *others))
    copy_origin(op, fused)
    fused.meta["val"] = (add.meta["val"], *op.meta["val"])
    for getitem in list(op.users):
        getitem.args = (fused, getitem.args[1] + 1)  # type: ignore[operator]
    graph.erase_node(op)
    add.target, add.args, add.kwargs = operator.getitem, (fused, 0), {}
