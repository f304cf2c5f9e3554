"""Recognise the layout in which a matmul wants its scales by where each scale ends up.

``aten._scaled_mm`` reads E8M0 scales in the 128x4 blocked layout of tcgen05 (cuBLAS documentation,
"1D block scaling factors layout"). However a graph spells the rearrangement, it moves bytes: the
same moves are done to numbered elements and compared with ``functional.blocked_scales``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import aten, is_call, is_view, tensor_of
from mxnorm_pass.numerics.layout import blocked_scales

_FILLS = frozenset({aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default})
_REINTERPRETS = frozenset({aten.view.dtype})
_MOVES = frozenset(
    {
        aten.permute.default,
        aten.t.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.slice_scatter.default,
        aten.constant_pad_nd.default,
        aten.copy.default,
        aten.cat.default,
    }
)


def _rearranged(scales: Tensor) -> Tensor:
    """torchao::triton_mx_block_rearrange: [M, K] -> [M, K], both padded to 128 x 4."""
    rows, columns = (-(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4)
    return blocked_scales(scales).reshape(rows, columns)


# Rearrangements that are one op of torchao (torchao/prototype/mx_formats/kernels.py).
_OPAQUE: dict[str, Callable[[Tensor], Tensor]] = {"torchao::triton_mx_block_rearrange": _rearranged}
_known: dict[str, bool] = {}


def moves_bytes(node: fx.Node) -> bool:
    """Does the node only put bytes elsewhere, maybe with zeros between them?"""
    return is_call(node, _MOVES | _FILLS | _REINTERPRETS) or is_view(node) or _name(node) in _OPAQUE


def is_blocked(scales: fx.Node, end: fx.Node) -> bool:
    """Does ``end`` hold the bytes of ``scales`` [..., K] in the 128x4 blocked layout?

    False where a shape is symbolic: then the graph's own moves are kept.
    """
    order = list(_moves_between(scales, end))
    key = _fingerprint(scales, order)
    if key is None:
        return False
    if key not in _known:
        _known[key] = _evaluate(scales, order)
    return _known[key]


def _moves_between(scales: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """The nodes that ``end`` is computed from, down to ``scales``, in graph order."""
    found: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node is not scales and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    yield from sorted(found)


def _fingerprint(scales: fx.Node, order: list[fx.Node]) -> str | None:
    """The moves as text without names; None where they are no moves of static shapes."""
    names = {node: f"%{i}" for i, node in enumerate([scales, *order])}
    lines = []
    for node in order:
        value = tensor_of(node)
        if not moves_bytes(node) or value is None or value.element_size() != 1:
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: names[n])
        lines.append(f"{node.target}{args}{kwargs.get('dim')}{kwargs.get('step')}")
    shape = tensor_of(scales).shape  # type: ignore[union-attr]
    sizes = [*shape, *(a for n in order for a in pytree.tree_leaves(n.args))]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    return "\n".join([str(tuple(shape)), *lines])


def _evaluate(scales: fx.Node, order: list[fx.Node]) -> bool:
    with real_tensors():
        shape = tuple(tensor_of(scales).shape)  # type: ignore[union-attr]
        numbered = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.int32).view(shape)
        results: dict[fx.Node, Tensor] = {scales: numbered}
        try:
            for node in order:
                results[node] = _move(node, results)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        want = blocked_scales(numbered.reshape(-1, shape[-1]))
        return torch.equal(results[order[-1]].flatten(), want.flatten()) if order else False


def _move(node: fx.Node, results: dict[fx.Node, Tensor]) -> Tensor:
    args: tuple[Any, ...] = fx.map_arg(node.args, lambda n: results[n])
    moved: Tensor
    if node.target in _FILLS:
        return torch.zeros(tuple(tensor_of(node).shape), dtype=torch.int32)  # type: ignore[union-attr]
    if node.target in _REINTERPRETS:
        moved = args[0]
    elif _name(node) in _OPAQUE:
        moved = _OPAQUE[_name(node)](args[0])
    else:
        moved = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return moved


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""
