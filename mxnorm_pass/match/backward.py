"""Find a norm's part of the joint graph's backward.

Autograd numbers its ops; the forward and backward nodes of one op share the number
(``meta["seq_nr"]``). The backward nodes that carry the numbers of a norm's forward nodes are its
VJP, whatever they spell. It is entered by one tensor, the cotangent of the norm's output, and left
by at most three kinds of nodes::

    cotangent [.., D] -> { VJP } -> gradient(s) of x [.., D], gradient of the gain [D]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from mxnorm_pass.graph_code import type_name
from mxnorm_pass.graph_utils import (
    aten,
    is_backward,
    is_call,
    is_dtype_cast,
    is_view,
    same_shape,
    same_size,
    seq_nr,
    tensor_of,
)
from mxnorm_pass.match.norm import Norm
from mxnorm_pass.match.skip import Skip
from mxnorm_pass.report import SkipReason


@dataclass(frozen=True)
class NormBackward:
    """The VJP of one norm.

    Attributes:
        cotangent: gradient of the norm's output.
        nodes: the VJP's nodes.
        x_grads: nodes that add up to the gradient of ``norm.x``.
        gain_grads: nodes that add up to the gradient of ``norm.gain``.
    """

    cotangent: fx.Node
    nodes: frozenset[fx.Node]
    x_grads: tuple[fx.Node, ...]
    gain_grads: tuple[fx.Node, ...]


@dataclass(frozen=True)
class BackwardIndex:
    """Backward nodes by autograd number, in graph order; empty for an inference graph.

    Attributes:
        recorded: the forward node for which autograd drew the number. Those that it does not
            differentiate draw none and bear the number of the op before them.
    """

    by_seq_nr: Mapping[int, tuple[fx.Node, ...]]
    recorded: Mapping[int, fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph) -> BackwardIndex:
        by_seq_nr: dict[int, list[fx.Node]] = {}
        recorded: dict[int, fx.Node] = {}
        for node in graph.nodes:
            number = seq_nr(node)
            if number is None or node.op != "call_function":
                continue
            if is_backward(node):
                by_seq_nr.setdefault(number, []).append(node)
            else:
                recorded.setdefault(number, node)
        return cls({k: tuple(v) for k, v in by_seq_nr.items()}, recorded)

    def nodes(self, seq_nrs: Iterable[int]) -> list[fx.Node]:
        return [node for n in sorted(seq_nrs) for node in self.by_seq_nr.get(n, ())]

    def origin(self, node: fx.Node) -> fx.Node | None:
        """The forward node whose derivative a backward node computes."""
        number = seq_nr(node)
        return None if number is None else self.recorded.get(number)


def norm_backward(norm: Norm, index: BackwardIndex) -> NormBackward | Skip | None:
    """The norm's VJP; None where the graph has none (inference, or nothing to train before)."""
    candidates = {n for n in index.nodes(norm.seq_nrs) if _same_module(n, norm)}
    if not candidates:
        return None
    region = {n for n in candidates if index.origin(n) in norm.nodes}
    if not region:
        first = min(candidates)
        detail = f"{first.name} may be part of the norm's backward or not"
        return _skip(first, detail, "the derivative of one of the norm's own ops")
    _add_accumulations(region)
    entries = {
        i for node in region for i in node.all_input_nodes if is_backward(i) and i not in region
    }
    exits = [n for n in sorted(region) if any(u not in region for u in n.users)]
    output = tensor_of(norm.output)
    if len(entries) != 1 or output is None:
        names = ", ".join(sorted(e.name for e in entries)) or "nothing"
        detail = f"the norm's backward reads {names}"
        return _skip(min(entries or region), detail, "one cotangent of the norm's output")
    cotangent = entries.pop()
    value = tensor_of(cotangent)
    if value is None or not same_shape(value.shape, output.shape):
        detail = f"the cotangent {cotangent.name} is {type_name(cotangent)}"
        return _skip(cotangent, detail, f"the output's shape, {type_name(norm.output)}")
    x_grads, gain_grads = [], []
    for node in exits:
        if _is_gain_grad(node, norm):
            gain_grads.append(node)
        elif _has_shape_of(node, norm.x):
            x_grads.append(node)
        else:
            detail = f"{node.name} {type_name(node)} leaves the norm's backward"
            return _skip(node, detail, "the gradient of the norm's input or gain")
    if len(gain_grads) > 1:
        detail = "x has a single row, so its gradient and the gain's look alike"
        return _skip(gain_grads[1], detail, "one gradient of the gain")
    return NormBackward(cotangent, frozenset(region), tuple(x_grads), tuple(gain_grads))


def _is_gain_grad(node: fx.Node, norm: Norm) -> bool:
    if norm.gain is None or not _has_size_of(node, norm.gain):
        return False
    # With a single row x is as large as the gain; then the op that multiplies by it decides.
    single_row = _has_size_of(norm.x, norm.gain)
    return not single_row or seq_nr(node) in {seq_nr(n) for n in norm.nodes & set(norm.gain.users)}


def _skip(node: fx.Node, detail: str, expected: str) -> Skip:
    return Skip(SkipReason.BACKWARD, detail, node, expected)


def _same_module(node: fx.Node, norm: Norm) -> bool:
    """Numbers also fall on the ops next to non-differentiable ones; the module tells them apart."""
    return _stack(node, "fwd_nn_module_stack") == _stack(norm.anchor, "nn_module_stack")


def _stack(node: fx.Node, key: str) -> tuple[str, ...]:
    stack = node.meta.get(key) or node.meta.get("nn_module_stack") or {}
    return tuple(entry[0] for entry in stack.values())


def _add_accumulations(region: set[fx.Node]) -> None:
    """Autograd's sums of gradients have numbers of their own; take in those within the region."""
    pending = list(region)
    while pending:
        for user in pending.pop().users:
            inside = all(i in region for i in user.all_input_nodes)
            if user not in region and inside and is_call(user, (aten.add.Tensor,)):
                region.add(user)
                pending.append(user)


def _has_shape_of(node: fx.Node, other: fx.Node) -> bool:
    a, b = tensor_of(node), tensor_of(other)
    return a is not None and b is not None and same_shape(a.shape, b.shape)


def _has_size_of(node: fx.Node, other: fx.Node) -> bool:
    a, b = tensor_of(node), tensor_of(other)
    return a is not None and b is not None and same_size(a.numel(), b.numel())


@dataclass(frozen=True)
class CotangentSplit:
    """A cotangent as the sum of what fused consumers and all other readers contribute.

    Each term holds the cotangent's elements in row-major order, maybe in another shape and dtype.
    """

    fused: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]


def split_cotangent(
    cotangent: fx.Node, fused: frozenset[int], shared: frozenset[int]
) -> CotangentSplit:
    """Take apart autograd's sum of gradients by the autograd numbers of its terms.

    Args:
        fused: numbers of ops that serve fused consumers alone.
        shared: numbers of views and dtype casts that serve fused and other readers.
    """
    number = seq_nr(cotangent)
    terms: list[fx.Node] = []
    if number in fused:
        return CotangentSplit((cotangent,), ())
    if number in shared and is_backward(cotangent):
        if is_view(cotangent) or is_dtype_cast(cotangent):
            terms = cotangent.all_input_nodes[:1]
    elif is_call(cotangent, (aten.add.Tensor,)) and is_backward(cotangent):
        if not cotangent.kwargs:
            terms = [a for a in cotangent.args[:2] if isinstance(a, fx.Node)]
    parts = [split_cotangent(term, fused, shared) for term in terms]
    of_fused = tuple(node for part in parts for node in part.fused)
    if not of_fused:
        # One term, whatever it sums: it may be the gradient that another norm's rewrite replaces.
        return CotangentSplit((), (cotangent,))
    return CotangentSplit(of_fused, tuple(node for part in parts for node in part.rest))


def backward_readers(
    path: Iterable[fx.Node], seq_nrs: frozenset[int] | None = None
) -> list[tuple[fx.Node, fx.Node]]:
    """(node read, reader): backward nodes that read a node of ``path``.

    Args:
        seq_nrs: numbers of which a reader must bear one; None: any reader counts.
    """
    found = []
    for node in path:
        for user in node.users:
            if is_backward(user) and (seq_nrs is None or seq_nr(user) in seq_nrs):
                found.append((node, user))
    return found
