"""Cast the operands of the backward's matmuls, in the joint graph, as recipes say.

Each linear that was marked before autograd is opened into the ops that it always was. Those of
which the pass casts the forward, or leaves it to high precision because the recipe does, get their
recipe; of all others the backward's matmuls stay in high precision.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.build import created_nodes
from mxnorm_pass.graph.cleanup import merge_equal, remove_dead
from mxnorm_pass.graph.matmul import LINEAR_KEY, UNREACHED, is_matmul
from mxnorm_pass.graph.nodes import aten, has_backward, is_backward, is_transpose, is_view
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.numerics.philox import Matmul
from mxnorm_pass.numerics.recipe import MatmulRecipe, OperandCast, in_format
from mxnorm_pass.numerics.recipe_text import recipe_text
from mxnorm_pass.ops.linears import is_writable, written_matmul
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.linears.castable import obstacle
from mxnorm_pass.passes.match.linears.plain import PlainLinear, linear_name, plain_linear
from mxnorm_pass.report.linear import Depth, LinearCasts

# Among the arguments of ``recipe_matmul``.
_KEY_POSITION, _MATMUL, _RECIPE = 3, 5, 6
# Of the partitioner (torch 2.13): an operand's cast is made when it is multiplied. It is none that
# the partitioner would recompute, and so that of a weight would be kept from forward to backward.
_IN_BACKWARD = "must_be_in_backward"


def open_linears(graph: fx.Graph, tracer: FunctionTracer) -> None:
    """Put the ops of a linear in the place of each mark, and its key on the matmul."""
    for node in graph.find_nodes(op="call_function", target=ops.linear):
        x, weight, bias, _, key, input_key = node.args
        with created_nodes(graph) as created:
            reference = ops.OPS[ops.linear].reference
            opened = tracer.graft(graph, node, reference, (x, weight, bias, None, key, input_key))
        for new in filter(is_matmul, created):
            new.meta[LINEAR_KEY] = key
        node.replace_all_uses_with(opened)
        graph.erase_node(node)


def note_unreached(graph: fx.Graph) -> None:
    """Note on the forward's matmuls whose backward no recipe reaches: they were not marked."""
    if not has_backward(graph.nodes):
        return
    for node in filter(is_matmul, graph.nodes):
        if not is_backward(node) and LINEAR_KEY not in node.meta:
            node.meta[UNREACHED] = True


def write_recipes(
    graph: fx.Graph, cast: Iterable[PlainLinear], config: MXNormConfig, tracer: FunctionTracer
) -> None:
    """Write the recipes of the linears in ``cast`` into their backward; open all other matmuls."""
    recipes = {
        linear.matmul.meta.get(LINEAR_KEY): config.resolve(linear.name).config.recipe
        for linear in cast
    }
    written = False
    for node in graph.find_nodes(op="call_function", target=ops.recipe_matmul):
        recipe = recipes.get(node.args[_KEY_POSITION])
        matmul: Matmul = node.args[_MATMUL]
        plan = MatmulRecipe() if recipe is None else recipe.matmul(matmul)
        node.update_arg(_RECIPE, recipe_text(plan))
        if plan == MatmulRecipe():
            _open(graph, node, tracer)
        elif is_writable(node.args[0].meta["val"].shape[-1], plan):
            _write(graph, node, tracer)
            written = True
    if written:
        merge_equal(filter(_is_read, list(graph.nodes)))
        remove_dead(graph)


def linear_casts(
    graph: fx.Graph, cast: Iterable[PlainLinear], config: MXNormConfig
) -> tuple[LinearCasts, ...]:
    """What becomes of each of the forward's linears; nothing where no recipe was asked for."""
    if not config.recipes:
        return ()
    matmuls = {linear.matmul: linear for linear in cast}
    in_training = has_backward(graph.nodes)
    found = []
    for node in filter(is_matmul, graph.nodes):
        if is_backward(node) or not linear_name(node):
            continue
        if node in matmuls:
            found.append(_casts_of(matmuls[node], config, in_training))
        else:
            found.append(_left(node, config))
    return tuple(found)


_HIGH = str(OperandCast())


def _casts_of(linear: PlainLinear, config: MXNormConfig, in_training: bool) -> LinearCasts:
    resolved = config.resolve(linear.name)
    own = resolved.config
    recipe = own.recipe or in_format(own.cast_format)
    return LinearCasts(
        linear.name,
        str(recipe.forward),
        dgrad=str(recipe.dgrad) if in_training else "",
        wgrad=str(recipe.wgrad) if in_training else "",
        depth="unknown" if resolved.depth_unknown else "",
    )


def _left(node: fx.Node, config: MXNormConfig) -> LinearCasts:
    name, linear = linear_name(node), plain_linear(node)
    if linear is None:
        return LinearCasts(name, _HIGH, reason="a product of no activation with a weight")
    why = obstacle(linear, config)
    if why is None:
        return LinearCasts(name, _HIGH, reason="no norm feeds it, and quantize is 'norm-fed'")
    depth: Depth = "kept" if why == config.resolve(linear.name).kept_by_depth else ""
    return LinearCasts(name, _HIGH, reason=f"a linear {why}", depth=depth)


def _write(graph: fx.Graph, node: fx.Node, tracer: FunctionTracer) -> None:
    """Cast and widen the operands by ops of their own."""
    left, right, seed, key, right_key, *rest = node.args
    # Traced once for all matmuls of these shapes: keys are put in behind it.
    traced = (left, right, seed, _ANY_KEY, _ANY_RIGHT_KEY, *rest)
    with created_nodes(graph) as created:
        product = tracer.graft(graph, node, written_matmul, traced)
    keys = {_ANY_KEY: key, _ANY_RIGHT_KEY: right_key}
    for new in created:
        if new.target in _CASTS:
            new.meta["partitioner_tag"] = _IN_BACKWARD
        if new.target in _DRAWING:
            new.args = tuple(
                keys.get(arg, arg) if isinstance(arg, int) else arg for arg in new.args
            )
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _is_read(node: fx.Node) -> bool:
    """Is it on the way from an operand of the backward to what is multiplied?"""
    own = (*_CASTS, ops.dequantize, operator.getitem, aten.constant_pad_nd.default)
    return is_backward(node) and (node.target in own or is_view(node) or is_transpose(node))


_DRAWING = (ops.operand_cast, ops.operand_tensor_scale)
_CASTS = (ops.cast, ops.tensor_scale, *_DRAWING)
# No linear's.
_ANY_KEY, _ANY_RIGHT_KEY = -1, -2


def _open(graph: fx.Graph, node: fx.Node, tracer: FunctionTracer) -> None:
    left, right, _, *rest = node.args
    reference = ops.OPS[ops.recipe_matmul].reference
    product = tracer.graft(graph, node, reference, (left, right, None, *rest))
    node.replace_all_uses_with(product)
    graph.erase_node(node)
