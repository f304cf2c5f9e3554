"""Write a cast of this package into a graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call, outputs_of
from mxnorm_pass.numerics.formats import BlockFormat


def write_cast(
    graph: fx.Graph,
    like: fx.Node,
    source: fx.Node,
    fmt: BlockFormat,
    tensor_scale: fx.Node | None = None,
    square_blocks: bool = False,
) -> tuple[fx.Node, ...]:
    """The nodes of values and scales, at the graph's insertion point, from where ``like`` comes."""
    options: tuple[Any, ...] = () if tensor_scale is None else (tensor_scale,)
    if square_blocks:
        options = (tensor_scale, True)
    return outputs_of(graph, like, call(graph, like, ops.cast, source, fmt.name, *options))
