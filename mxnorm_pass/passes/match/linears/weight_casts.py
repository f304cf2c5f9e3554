"""What each call of a graph for inference spends on casts of weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.code import add_bytes, value_type
from mxnorm_pass.graph.inputs import PARAMETER
from mxnorm_pass.graph.nodes import ancestors, dtype_of, tensor_of
from mxnorm_pass.ops.mx_linear import MXLinearCall
from mxnorm_pass.report.site import WeightCasts


def weight_casts(graph: fx.Graph) -> WeightCasts:
    """Of the linears on MX operands whose weights are parameters of high precision."""
    written: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    sources: dict[fx.Node, None] = {}
    for node in graph.find_nodes(op="call_function", target=ops.mx_linear):
        linear = MXLinearCall.of(node.args)
        found = [n for n in ancestors(linear.weight) if _is_wide_parameter(n)]
        if found:
            sources |= dict.fromkeys(found)
            written[linear.weight] = (linear.weight, linear.weight_scales)
    return WeightCasts(
        len(written),
        _bytes(sources),
        _bytes(node for pair in written.values() for node in pair),
    )


def _is_wide_parameter(node: fx.Node) -> bool:
    value = tensor_of(node)
    is_wide = value is not None and value.ndim == 2 and dtype_of(node).itemsize > 1
    return is_wide and (node.op == "get_attr" or bool(node.meta.get(PARAMETER)))


def _bytes(nodes: Iterable[fx.Node]) -> int | None:
    return add_bytes(value_type(node.meta["val"]).bytes for node in nodes)
