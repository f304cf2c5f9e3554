"""Put the kernels that cast operands of matmuls in the place of the ops that do.

Of a matrix and of its transpose it makes both casts, as of the gradient that dgrad and wgrad
read::

    dY -> operand_cast -> values, scales -> dequantize             dY -> kernel -> y, y_t
      \\-> permute -> operand_cast -> values, scales -> dequantize   =>

What is cast along rows alone, to nearest and as it is, is left to Inductor, which fuses it with
what made it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.functional_tensor import dispatch_functionalize

from mxnorm_pass import ops
from mxnorm_pass.graph.build import created_nodes
from mxnorm_pass.graph.nodes import is_transpose, tensor_of
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.kernels.coverage import uncovered_operand
from mxnorm_pass.numerics.formats import block_format
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.nvfp4 import nvfp4_tensor_scale
from mxnorm_pass.numerics.philox import Use
from mxnorm_pass.numerics.recipe import OperandCast
from mxnorm_pass.numerics.recipe_text import operand_of_text, operand_text
from mxnorm_pass.passes.dequantized import dequantized_dtype, dequantizing_readers

log = logging.getLogger(__name__)

_RESULTS = (0, 1)


@dataclass(frozen=True)
class _Cast:
    """A node that casts a matrix, or the transpose of one.

    Attributes:
        seed, tensor_scale: nodes, or None.
    """

    node: fx.Node
    operand: Operand
    seed: Any = None
    key: int = 0
    right_key: int = 0
    tensor_scale: Any = None

    @property
    def is_transposed(self) -> bool:
        return is_transpose(self.node.args[0])  # type: ignore[arg-type]

    @property
    def matrix(self) -> fx.Node:
        source: Any = self.node.args[0]
        return source.args[0] if self.is_transposed else source  # type: ignore[no-any-return]

    @cached_property
    def readers(self) -> list[fx.Node]:
        """Those that alone read its results, to undo it."""
        if self.node.target is ops.operand_tensor_scale:
            return []
        fmt = self.operand.cast.format
        assert fmt is not None
        return dequantizing_readers(self.node, _RESULTS, fmt, self.tensor_scale)

    def arguments(self) -> tuple[Any, ...]:
        """For a trace, which serves all keys."""
        keys = (self.seed, 0, 0, self.tensor_scale)
        return operand_text(self.operand), *keys, dequantized_dtype(self.readers)

    def why_no_kernel(self) -> str | None:
        value = tensor_of(self.matrix)
        if value is None or value.ndim != 2:
            return "what is cast is no matrix"
        others = (tensor_of(n) for n in (self.seed, self.tensor_scale) if n is not None)
        return uncovered_operand(value, self.operand, *others)


_NO_CAST = (None,) * 6


def lower_operand_casts(graph: fx.Graph, tracer: FunctionTracer) -> int:
    """Replace the casts that the kernel covers; returns how many kernels there are then."""
    scales = list(_covered(graph, (ops.operand_tensor_scale,)))
    for scale in scales:
        args = (scale.matrix, scale.is_transposed, *scale.arguments())
        with created_nodes(graph) as created:
            found = tracer.graft(graph, scale.node, _run_scale, args)
        _put_in_keys(created, {"": scale})
        scale.node.replace_all_uses_with(found)
        graph.erase_node(scale.node)
    pairs = list(_pairs(_covered(graph, (ops.operand_cast, ops.cast))))
    for along_rows, along_columns in pairs:
        _insert_kernel(graph, along_rows, along_columns, tracer)
    if pairs:
        stable_topological_sort(graph)
    return len(scales) + len(pairs)


def _covered(graph: fx.Graph, targets: Collection[Any]) -> Iterator[_Cast]:
    for node in [n for n in graph.nodes if n.target in targets]:
        cast = _cast_of(node)
        reason = cast.why_no_kernel()
        if reason is None:
            yield cast
        else:
            log.debug("%s is decomposed: %s", node.name, reason)


def _cast_of(node: fx.Node) -> _Cast:
    if node.target is not ops.cast:
        given: Any = node.args[1:]
        seed, key, right_key, text, *rest = given
        return _Cast(node, operand_of_text(text), seed, key, right_key, *rest)
    _, name, *options = node.args
    tensor_scale, square = (*options, None, False)[:2] if len(options) < 2 else options
    cast = OperandCast(block_format(name), square_blocks=bool(square))  # type: ignore[arg-type]
    return _Cast(node, Operand(cast, None, "forward", Use.LEFT), tensor_scale=tensor_scale)


def _pairs(casts: Iterator[_Cast]) -> Iterator[tuple[_Cast | None, _Cast | None]]:
    """A cast along rows and one along columns of each matrix, as far as there are both."""
    of_matrix: dict[fx.Node, tuple[list[_Cast], list[_Cast]]] = {}
    for cast in casts:
        of_matrix.setdefault(cast.matrix, ([], []))[cast.is_transposed].append(cast)
    for along_rows, along_columns in of_matrix.values():
        for one, other in zip_longest(along_rows, along_columns):
            if other is not None or not one.operand.is_plain:
                yield one, other


def _insert_kernel(
    graph: fx.Graph,
    along_rows: _Cast | None,
    along_columns: _Cast | None,
    tracer: FunctionTracer,
) -> None:
    casts = [cast for cast in (along_rows, along_columns) if cast is not None]
    sides = [_NO_CAST if c is None else c.arguments() for c in (along_rows, along_columns)]
    args = (casts[0].matrix, *sides[0], *sides[1])
    with created_nodes(graph) as created:
        results = iter(tracer.graft(graph, min(c.node for c in casts), _run, args))
    _put_in_keys(created, {"": along_rows, "_t": along_columns})
    for cast in casts:
        if cast.readers:
            dequantized = next(results)
            for reader in cast.readers:
                reader.replace_all_uses_with(dequantized)
                graph.erase_node(reader)
            continue
        for position, result in zip(_RESULTS, results, strict=False):
            for getitem in [user for user in cast.node.users if user.args[1] == position]:
                getitem.replace_all_uses_with(result)
    for cast in casts:
        for getitem in list(cast.node.users):
            graph.erase_node(getitem)
        graph.erase_node(cast.node)


def _put_in_keys(created: Iterable[fx.Node], casts: Mapping[str, _Cast | None]) -> None:
    """Give the kernel among the nodes the keys of the casts, by the suffix of their arguments."""
    from mxnorm_pass.kernels.operand_read import OperandRead
    from mxnorm_pass.kernels.operands import key_constants

    keys: dict[str, int] = {}
    for suffix, cast in casts.items():
        if cast is not None:
            read = OperandRead(cast.operand, None, cast.key, cast.right_key)
            keys |= key_constants(read, suffix)
    for node in created:
        if node.target is triton_kernel_wrapper_functional:
            given: Any = node.kwargs["kwargs"]
            node.update_kwarg("kwargs", _updated(given, keys))
            index: Any = node.kwargs["constant_args_idx"]
            hidden = _updated(kernel_side_table.get_constant_args(index), keys)
            node.update_kwarg("constant_args_idx", kernel_side_table.add_constant_args(hidden))


def _updated(arguments: Mapping[str, Any], keys: Mapping[str, int]) -> dict[str, Any]:
    return {name: keys.get(name, argument) for name, argument in arguments.items()}


def _cast_both(x: Tensor, *arguments: Any) -> Any:
    from mxnorm_pass.kernels.operand_casts import operand_casts
    from mxnorm_pass.kernels.operand_read import OperandRead

    sides = (arguments[: len(_NO_CAST)], arguments[len(_NO_CAST) :])
    reads = (
        None if text is None else OperandRead(operand_of_text(text), *rest) for text, *rest in sides
    )
    return operand_casts(x, *reads)


def _tensor_scale(x: Tensor, transposed: bool, text: str, *rest: Any) -> Tensor:
    from mxnorm_pass.kernels.operand_absmax import operand_absmax
    from mxnorm_pass.kernels.operand_read import OperandRead

    read = OperandRead(operand_of_text(text), *rest)
    return nvfp4_tensor_scale(operand_absmax(x, transposed, read))


# Without mutation: results are returned, not written into.
_run, _run_scale = dispatch_functionalize(_cast_both), dispatch_functionalize(_tensor_scale)
