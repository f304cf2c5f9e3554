"""What the passes ask of nodes: who is a view, who computes the same, who is the backward's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten
prims = torch.ops.prims

# Ops that keep the elements and their row-major order.
_VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten._reshape_alias.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)
# Of these the shape is the operand's, too.
_IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)
_TRANSPOSES = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
_DTYPE_CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype})
# Noted by this package where autograd's tracer has left no tag.
BACKWARD = "mxnorm_pass.backward"


def tensor_of(node: fx.Node) -> Tensor | None:
    """The fake tensor that stands for the node's value, None if it is no tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def makes_tensors(node: fx.Node) -> bool:
    """Is a tensor among what the node computes? Of one that says nothing, yes."""
    if "val" not in node.meta:
        return True
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta["val"]))


def dtype_of(node: Any) -> torch.dtype:
    """The dtype of a node that is known to hold a tensor."""
    value = tensor_of(node)
    assert value is not None, f"{node} holds no tensor"
    return value.dtype


def same_size(a: Any, b: Any) -> bool:
    """Equality of sizes that never adds a guard on a symbolic one."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def is_call(node: Any, targets: Iterable[Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_backward(node: fx.Node) -> bool:
    tag = node.meta.get("partitioner_tag")
    return tag in ("is_backward", "must_be_in_backward") or BACKWARD in node.meta


def has_backward(nodes: Iterable[fx.Node]) -> bool:
    """Is one of the nodes part of a backward?

    What copies a changed input back bears the tag in graphs for inference, too: a static cache's
    keys and values.
    """
    return any(is_backward(node) and not is_call(node, (aten.copy_.default,)) for node in nodes)


def partition_of(node: fx.Node) -> tuple[Any, ...]:
    """On which side the partitioner must put the node, whether and with what it is recomputed."""
    return tuple(node.meta.get(k) for k in ("partitioner_tag", "recompute", "ac_graph_id"))


def forward_users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not is_backward(user)]


def is_view(node: fx.Node) -> bool:
    """Does the node hold its first operand's elements in the same row-major order?"""
    if is_call(node, (aten.permute.default,)):
        # As einsum spells them, whether or not dimensions move.
        order = node.args[1]
        return [int(d) % len(order) for d in order] == list(range(len(order)))  # type: ignore
    if not is_call(node, _VIEWS):
        return False
    if node.target is not aten.expand.default:
        return True
    source, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    return source is not None and result is not None and same_size(source.numel(), result.numel())


def _is_identity(node: fx.Node) -> bool:
    return is_call(node, _IDENTITIES)


def is_expand(node: fx.Node) -> bool:
    return is_call(node, (aten.expand.default,))


def is_every_other(node: fx.Node) -> bool:
    """A slice of every other element along the last dimension, from the first or the second."""
    if not is_call(node, (aten.slice.Tensor,)) or len(node.args) != 5:
        return False
    source, dim, start, end, step = node.args
    value = tensor_of(source)  # type: ignore[arg-type]
    if value is None or not isinstance(dim, int) or dim % value.ndim != value.ndim - 1:
        return False
    size = value.shape[-1]
    reaches_end = isinstance(end, int) and (end == 2**63 - 1 or same_size(end, size))
    # Of one dimension, all of a tensor, the number may be symbolic: whoever asks must know.
    even = value.ndim == 1 or (isinstance(size, int) and size % 2 == 0)
    return bool(start in (0, 1) and step == 2 and reaches_end and even)


def interleaves(node: fx.Node) -> bool:
    """Does it put elements of several tensors side by side, one of each in turn?"""
    value = tensor_of(node)
    if value is None or not is_call(node, (aten.stack.default, aten.cat.default)):
        return False
    tensors, *dims = node.args
    dim = dims[0] if dims else node.kwargs.get("dim", 0)
    if not isinstance(dim, int) or dim % value.ndim != value.ndim - 1:
        return False
    if node.target is aten.stack.default:
        return True
    # As Inductor spells a stack.
    parts = map(tensor_of, tensors)  # type: ignore[arg-type]
    return all(part is not None and same_size(part.shape[-1], 1) for part in parts)


def is_transpose(node: fx.Node) -> bool:
    """Does the node swap the dimensions of a matrix?"""
    value = tensor_of(node)
    if value is None or value.ndim != 2 or not is_call(node, _TRANSPOSES):
        return False
    if node.target is aten.permute.default:
        order = [int(d) % 2 for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return order == [1, 0]
    if node.target is aten.transpose.int:
        return int(node.args[1]) % 2 != int(node.args[2]) % 2  # type: ignore[arg-type]
    return True


def is_dtype_cast(node: fx.Node) -> bool:
    """Does the node only change the floating-point dtype of its first operand?"""
    if not is_call(node, _DTYPE_CASTS):
        return False
    source, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    return (
        source is not None
        and result is not None
        and source.device == result.device
        and source.dtype.is_floating_point
        and result.dtype.is_floating_point
    )


def strip(node: fx.Node, *through: Callable[[fx.Node], bool]) -> fx.Node:
    """The first ancestor along first operands that none of the predicates sees through."""
    while any(see(node) for see in through):
        node = node.args[0]  # type: ignore[assignment]
    return node


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that the node is computed from."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def ancestors_after(node: fx.Node, first: fx.Node) -> set[fx.Node]:
    """``node`` and all that it is computed from, as far as it stands at ``first`` or below."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found and node >= first:
            found.add(node)
            pending += node.all_input_nodes
    return found


_SAME_VALUE_DEPTH = 8


def same_value(a: Any, b: Any, depth: int = _SAME_VALUE_DEPTH) -> bool:
    """Are two nodes one, or equal computations of the same nodes? False where that is unclear."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and bool(a == b)
    a, b = strip(a, _is_identity), strip(b, _is_identity)
    if a is b:
        return True
    if depth == 0 or a.op != "call_function" or b.op != "call_function" or a.target != b.target:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    return (
        a.kwargs.keys() == b.kwargs.keys()
        and same_value(a.args, b.args, depth - 1)
        and all(same_value(a.kwargs[k], b.kwargs[k], depth - 1) for k in a.kwargs)
    )


def input_position(node: fx.Node) -> int | None:
    """Position of a graph input among those that AOTAutograd was given, None if it has none."""
    position = getattr(node.meta.get("desc"), "idx", None)
    return position if isinstance(position, int) else None
