"""Write MX casts into the graph for plain bf16 and fp32 linears.

Before::

    activation -----------------------------> mm -> y
    weight -> permute ----------------------> mm

After::

    activation -> cast -> dequantize -------> mm -> y
    weight ----> cast -> dequantize -> permute -> mm

The backward keeps the high-precision operands, so the casts are passed straight through; where a
recipe casts these, ``passes.recipes`` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import call
from mxnorm_pass.graph.nodes import aten, dtype_of, is_backward, is_transpose
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.linears.castable import obstacle
from mxnorm_pass.passes.match.linears.plain import PlainLinear, plain_linear
from mxnorm_pass.passes.match.linears.readers import CastIndex, readers
from mxnorm_pass.passes.match.norms.find import Norm
from mxnorm_pass.passes.rewrite.tensor_scale import norm_tensor_scale
from mxnorm_pass.passes.rewrite.write_cast import write_cast


@dataclass(frozen=True)
class _Linear:
    """A linear to quantise, and the norm that feeds it."""

    linear: PlainLinear
    norm: Norm | None


def insert_casts(
    graph: fx.Graph, norms: Iterable[Norm], config: MXNormConfig, tracer: FunctionTracer
) -> tuple[PlainLinear, ...]:
    """Quantise the linears that ``config.quantize`` names, and return them.

    Of a linear whose recipe leaves the forward in high precision the forward stays as it is.
    """
    if config.quantize == "existing":
        return ()
    fed = list(_norm_fed(norms))
    quantized = []
    for found in _all_linears(graph, fed) if config.quantize == "all" else fed:
        if obstacle(found.linear, config) is not None:
            continue
        own = config.resolve(found.linear.name).config
        if own.casts_forward:
            _quantize(graph, found, own, tracer)
        quantized.append(found.linear)
    return tuple(quantized)


def _norm_fed(norms: Iterable[Norm]) -> Iterator[_Linear]:
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
                yield _Linear(linear, norm)


def _all_linears(graph: fx.Graph, fed: Iterable[_Linear]) -> Iterator[_Linear]:
    norms = {found.linear.matmul: found.norm for found in fed}
    for node in list(graph.nodes):
        linear = plain_linear(node) if not is_backward(node) else None
        if linear is not None:
            yield _Linear(linear, norms.get(node))


def _quantize(
    graph: fx.Graph, found: _Linear, config: MXNormConfig, tracer: FunctionTracer
) -> None:
    linear, fmt = found.linear, config.cast_format
    matmul = linear.matmul
    bound = _bound(graph, found, config, tracer)
    with graph.inserting_before(matmul):
        activation = _fake_quantize(graph, matmul, linear.activation, fmt, bound)
        square = config.recipe is not None and config.recipe.forward.right.square_blocks
        weight = _fake_quantize(graph, matmul, _rows(graph, linear), fmt, square_blocks=square)
        if not linear.transposes:
            weight = call(graph, matmul, aten.permute.default, weight, [1, 0])
    activation_position, weight_position = linear.operand_positions
    matmul.update_arg(activation_position, activation)
    matmul.update_arg(weight_position, weight)


def _bound(
    graph: fx.Graph, found: _Linear, config: MXNormConfig, tracer: FunctionTracer
) -> fx.Node | None:
    """The tensor scale of a norm's output from what bounds it; None where it has none.

    What bounds an estimate is left to the rewrite, which knows all of its options.
    """
    norm = found.norm
    if config.cast_format.has_e8m0_scales or config.tensor_scale != "bound":
        return None
    if norm is None or norm.estimated:
        return None
    matmul = found.linear.matmul
    return norm_tensor_scale(graph, math.sqrt(norm.width), norm.gain, matmul, matmul, tracer)


def _rows(graph: fx.Graph, linear: PlainLinear) -> fx.Node:
    """The weight as [N, D]."""
    if linear.transposes:
        return linear.weight
    if is_transpose(linear.weight):
        return linear.weight.args[0]  # type: ignore[return-value]
    return call(graph, linear.matmul, aten.permute.default, linear.weight, [1, 0])


def _fake_quantize(
    graph: fx.Graph,
    like: fx.Node,
    source: fx.Node,
    fmt: BlockFormat,
    tensor_scale: fx.Node | None = None,
    square_blocks: bool = False,
) -> fx.Node:
    if tensor_scale is None and not fmt.has_e8m0_scales:
        tensor_scale = call(graph, like, ops.tensor_scale, source)
    extra = () if tensor_scale is None else (tensor_scale,)
    values, scales = write_cast(graph, like, source, fmt, tensor_scale, square_blocks)
    dtype = dtype_of(source)
    return call(graph, like, ops.dequantize, values, scales, fmt.name, dtype, *extra)
