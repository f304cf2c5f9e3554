"""What belongs to each norm in the graph, and as what: what the report draws."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import forward_users, is_backward, is_view
from mxnorm_pass.passes.match.fusion import Decision, Fusion, Refusal
from mxnorm_pass.passes.match.linears.readers import CastIndex, readers
from mxnorm_pass.passes.match.norms.find import Norm
from mxnorm_pass.report.snapshot import Snapshot
from mxnorm_pass.report.traffic import is_free

# A weight is some views, a cast and its dequantisation away from the matmul.
_MAX_WEIGHT_NODES = 64
_MAX_MODULE_NODES = 64


def parts_of(decision: Decision, norms: Iterable[Norm], before: Snapshot) -> dict[fx.Node, str]:
    """The nodes that belong to a norm, with the part that each is of it.

    Args:
        norms: of the graph.
        before: the graph as it came in.
    """
    if isinstance(decision, Fusion):
        return dict(_parts_of_fusion(decision, before))
    norm = next((norm for norm in norms if norm.anchor is decision.anchor), None)
    return dict(_parts_of_refusal(decision, norm))


def parts_of_created(nodes: Iterable[fx.Node], fusion: Fusion) -> dict[fx.Node, str]:
    """The same of the nodes that the rewrite of a fusion has put into the graph."""
    return {node: _part_of_created(node, fusion) for node in nodes}


def _parts_of_fusion(fusion: Fusion, before: Snapshot) -> Iterator[tuple[fx.Node, str]]:
    """The nodes of the site with the part that each belongs to; what comes last holds."""
    yield from _as("norm backward", _backward_of(fusion.norm))
    for transposed in fusion.transposed:
        yield from _as("cast along T", transposed.cast.nodes)
    activations = {n for c in fusion.consumers for n in (*c.nodes, *c.cast.nodes)}
    for consumer in fusion.consumers:
        weight = "weight" if consumer.weight is None else "weight cast"
        yield from _as(weight, _weight_nodes(consumer.linear.matmul, activations, before))
        yield from _as("dequantize", consumer.linear.slice)
        yield from _as("cast", (*consumer.reader.path, *consumer.cast.nodes))
    yield from _as("linear", (consumer.linear.matmul for consumer in fusion.consumers))
    yield from _as("norm", fusion.norm.nodes)
    if fusion.residual is not None:
        yield fusion.residual, "residual add"


def _backward_of(norm: Norm) -> Iterator[fx.Node]:
    """The backward nodes that read the norm and its gain, and what is computed from them alone."""
    # Autograd saves results through views.
    inside = norm.nodes - {norm.output}
    saved = {user for node in inside for user in node.users if is_view(user)}
    sources = {norm.x, *inside, *saved, *([norm.gain] if norm.gain is not None else [])}
    found: set[fx.Node] = set()
    pending = [user for node in sources - {norm.x} for user in node.users]
    pending += [user for user in norm.x.users if user.all_input_nodes == [norm.x]]
    pending = [user for user in pending if is_backward(user)]
    while pending and len(found) < _MAX_MODULE_NODES:
        node = pending.pop()
        if node in found or node.op != "call_function":
            continue
        found.add(node)
        known = {*sources, *found}
        pending += [user for user in node.users if known.issuperset(user.all_input_nodes)]
    return iter(found)


def _parts_of_refusal(refusal: Refusal, norm: Norm | None) -> Iterator[tuple[fx.Node, str]]:
    """The norm, and the views and dtype casts on the way to its readers."""
    if norm is None:
        yield from _as("norm", _same_module(refusal.anchor))
        return
    for reader in readers(norm.output, CastIndex.of(())):
        yield from _as("norm", reader.path)
    yield from _as("norm", norm.nodes)


def _as(part: str, nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    return ((node, part) for node in nodes)


def _part_of_created(node: fx.Node, fusion: Fusion) -> str:
    if is_backward(node):
        return "norm backward"
    while is_free(node):
        node = node.all_input_nodes[0]
    op = ops.OPS.get(node.target)
    if op is not None and op.part:
        return op.part
    return "norm" if module_path(node) == fusion.norm.name else "weight cast"


def _weight_nodes(matmul: fx.Node, stop: Container[fx.Node], before: Snapshot) -> set[fx.Node]:
    """What is computed for the other operand of a linear, back to the inputs of the graph.

    Casts may have been inserted in front of the linear since it came in.
    """
    found: set[fx.Node] = set()
    pending = [*before.states[matmul].inputs, *matmul.all_input_nodes]
    while pending and len(found) < _MAX_WEIGHT_NODES:
        node = pending.pop()
        if node.op == "call_function" and node not in stop and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _same_module(anchor: fx.Node) -> set[fx.Node]:
    """The forward nodes around ``anchor`` that its module made, at most a few."""
    module = module_path(anchor)
    found = {anchor}
    pending = [anchor] if module else []
    while pending and len(found) < _MAX_MODULE_NODES:
        node = pending.pop()
        for other in (*node.all_input_nodes, *forward_users(node)):
            if other not in found and other.op == "call_function" and module_path(other) == module:
                found.add(other)
                pending.append(other)
    return found
