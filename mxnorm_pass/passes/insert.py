"""Write MX casts into the graph for plain bf16 and fp32 linears.

Before::

    activation -----------------------------> mm -> y
    weight -> permute ----------------------> mm

After::

    activation -> cast -> dequantize -------> mm -> y
    weight ----> cast -> dequantize -> permute -> mm

Only the forward matmul changes: the backward keeps the high-precision operands, so the casts are
passed straight through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call, outputs_of
from mxnorm_pass.graph.nodes import aten, dtype_of, is_backward, is_transpose
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.linears.castable import obstacle
from mxnorm_pass.passes.match.linears.plain import PlainLinear, plain_linear
from mxnorm_pass.passes.match.linears.readers import CastIndex, readers
from mxnorm_pass.passes.match.norms.find import Norm


def insert_casts(graph: fx.Graph, norms: Iterable[Norm], config: MXNormConfig) -> int:
    """Quantise the linears that ``config.quantize`` names; returns how many."""
    if config.quantize == "existing":
        return 0
    linears = _all_linears(graph) if config.quantize == "all" else _norm_fed(norms)
    inserted = 0
    for linear in linears:
        if obstacle(linear, config) is not None:
            continue
        _quantize(graph, linear, config.resolve(linear.name).config.cast_format)
        inserted += 1
    return inserted


def _norm_fed(norms: Iterable[Norm]) -> Iterator[PlainLinear]:
    none = CastIndex.of(())
    seen: set[fx.Node] = set()
    for norm in norms:
        if norm.problem is not None:
            continue
        for reader in readers(norm.output, none):
            linear = plain_linear(reader.node)
            end = reader.path[-1] if reader.path else norm.output
            if linear is not None and linear.activation is end and linear.matmul not in seen:
                seen.add(linear.matmul)
                yield linear


def _all_linears(graph: fx.Graph) -> Iterator[PlainLinear]:
    for node in list(graph.nodes):
        linear = plain_linear(node) if not is_backward(node) else None
        if linear is not None:
            yield linear


def _quantize(graph: fx.Graph, linear: PlainLinear, fmt: BlockFormat) -> None:
    matmul = linear.matmul
    with graph.inserting_before(matmul):
        activation = _fake_quantize(graph, matmul, linear.activation, fmt)
        weight = _fake_quantize(graph, matmul, _rows(graph, linear), fmt)
        if not linear.transposes:
            weight = call(graph, matmul, aten.permute.default, weight, [1, 0])
    activation_position, weight_position = linear.operand_positions
    matmul.update_arg(activation_position, activation)
    matmul.update_arg(weight_position, weight)


def _rows(graph: fx.Graph, linear: PlainLinear) -> fx.Node:
    """The weight as [N, D]."""
    if linear.transposes:
        return linear.weight
    if is_transpose(linear.weight):
        return linear.weight.args[0]  # type: ignore[return-value]
    return call(graph, linear.matmul, aten.permute.default, linear.weight, [1, 0])


def _fake_quantize(graph: fx.Graph, like: fx.Node, source: fx.Node, fmt: BlockFormat) -> fx.Node:
    cast = call(graph, like, ops.cast, source, fmt.name)
    values, scales = outputs_of(graph, like, cast)
    dtype = dtype_of(source)
    return call(graph, like, ops.dequantize, values, scales, fmt.name, dtype)
