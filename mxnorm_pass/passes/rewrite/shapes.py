"""One node in the shape and dtype of another."""

from __future__ import annotations

import torch
from torch import fx

from mxnorm_pass.graph.build import call
from mxnorm_pass.graph.nodes import aten, dtype_of, prims, same_shape, same_size, tensor_of


def byte_view(graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """``node`` in the shape and dtype of ``like``: scales may be read as E8M0 or as bytes."""
    view = reshape_like(graph, at, node, like)
    if dtype_of(view) == dtype_of(like):
        return view
    return call(graph, at, aten.view.dtype, view, dtype_of(like))


def reshape_like(graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """View ``node`` in the shape of ``like``, which has as many elements."""
    own, target = tensor_of(node), tensor_of(like)
    assert own is not None and target is not None
    return _reshape(graph, at, node, like, list(target.shape))


def rows_like(graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """View ``node`` with the leading dimensions of ``like``, which has as many rows."""
    own, target = tensor_of(node), tensor_of(like)
    assert own is not None and target is not None
    return _reshape(graph, at, node, like, [*target.shape[:-1], own.shape[-1]])


def _reshape(
    graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node, sizes: list[object]
) -> fx.Node:
    own = tensor_of(node)
    assert own is not None
    if same_shape(own.shape, sizes):
        return node
    symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbolic) == 1:
        sizes[symbolic[0]] = -1
    else:
        for i in symbolic:
            sizes[i] = _size_of(graph, at, node, like, i)
    return call(graph, at, aten.reshape.default, node, sizes)


def _size_of(graph: fx.Graph, at: fx.Node, node: fx.Node, like: fx.Node, dim: int) -> fx.Node:
    """Size ``dim`` of ``like``, read off ``node`` if it has it: ``like`` may stand further down."""
    own, target = tensor_of(node), tensor_of(like)
    assert own is not None and target is not None
    for i, size in enumerate(own.shape):
        if same_size(size, target.shape[dim]):
            return call(graph, at, aten.sym_size.int, node, i)
    return call(graph, at, aten.sym_size.int, like, dim)


def to_dtype(graph: fx.Graph, at: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if dtype_of(node) == dtype:
        return node
    return call(graph, at, prims.convert_element_type.default, node, dtype)
