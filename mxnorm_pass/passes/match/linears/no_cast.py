"""Say why nothing that reads a norm is cast: which readers there are, and what they do instead."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from torch import fx

from mxnorm_pass.graph.code import call_text, type_name
from mxnorm_pass.graph.matmul import is_product
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import aten, forward_users, is_call, tensor_of
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.linears.castable import obstacle
from mxnorm_pass.passes.match.linears.plain import PlainLinear, plain_linear
from mxnorm_pass.passes.match.linears.readers import Reader
from mxnorm_pass.passes.match.linears.router import is_router
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason

_SHOWN = 3
# From a norm to the attention or the experts it feeds there is a handful of ops.
_MAX_STEPS = 64
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})


def no_cast(output: fx.Node, read_by: Sequence[Reader], config: MXNormConfig) -> Skip:
    """The refusal of a norm whose readers, seen without casts, are ``read_by``.

    It points at the first linear, else at the first reader.
    """
    linears = {r.node: linear for r in read_by if (linear := plain_linear(r.node)) is not None}
    # Linears first: theirs is the cast that is missing.
    ordered = sorted(read_by, key=lambda reader: reader.node not in linears)
    texts = dict.fromkeys(_reader_text(r, output, linears.get(r.node), config) for r in ordered)
    shown = list(texts)[:_SHOWN] + [f"{len(texts) - _SHOWN} more"] * (len(texts) > _SHOWN)
    detail = "; ".join(shown) or "no reader at all"
    first = next((r.node for r in ordered if r.node.op != "output"), output)
    return Skip(SkipReason.NO_MX_CAST, detail, first, "a linear with an MX cast")


def _reader_text(
    reader: Reader, output: fx.Node, linear: PlainLinear | None, config: MXNormConfig
) -> str:
    if linear is not None:
        kind = "router" if is_router(linear) else "linear"
        text = f"{linear.name}, a {kind} in {type_name(linear.activation).partition('[')[0]}"
        if linear.activation is not (reader.path[-1] if reader.path else output):
            return f"{text} that reads it as weight or bias"
        return f"{text} {obstacle(linear, config) or _without_cast(linear, config)}"
    if reader.node.op == "output":
        return "an output of the graph"
    text, module = call_text(reader.node), module_path(reader.node)
    text += f" in {module}" if module else ""
    product = _fed_product(reader.node, {output, *reader.path})
    if product is None or product is reader.node:
        return text
    elsewhere = f" in {module_path(product)}" if module_path(product) != module else ""
    return f"{text}, which feeds {product.target}{elsewhere}"


def _without_cast(linear: PlainLinear, config: MXNormConfig) -> str:
    by_recipe = not config.resolve(linear.name).config.casts_forward
    return "whose forward its recipe leaves without a cast" if by_recipe else "without a cast"


def _fed_product(reader: fx.Node, known: set[fx.Node]) -> fx.Node | None:
    """The next product that the reader leads to, short of sums with what is not in ``known``.

    Such a sum is a residual stream, which feeds all that follows.
    """
    queue, steps = [reader], 0
    while queue and steps < _MAX_STEPS:
        # In graph order, so that a node's operands are known before it is.
        node, steps = heappop(queue), steps + 1
        if is_product(node):
            return node
        operands = [n for n in node.all_input_nodes if tensor_of(n) is not None]
        if node in known or (is_call(node, _SUMS) and not known.issuperset(operands)):
            continue
        known.add(node)
        for user in forward_users(node):
            heappush(queue, user)
    return None
