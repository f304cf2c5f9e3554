"""Which dimensions of a graph's tensors are indexed by the channels of the residual stream.

Every dimension of every tensor is a variable. An op says which of them run over the same index:
an elementwise op all that are aligned, a matmul those that it contracts. Dimensions whose order an
op depends on, such as those that it splits, concatenates or sorts along, are pinned by it; so are
all dimensions of an op that has no rule, of inputs and of outputs. What is connected to the
embedding's channels and not pinned can be permuted without changing what the graph computes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.nodes import aten, prims, same_size


class Dim:
    """A dimension of a tensor, joined with those that run over the same index (union-find).

    Attributes:
        pinned_by: the first node that needs the index in its order.
    """

    def __init__(self) -> None:
        self._parent: Dim | None = None
        self._pinned_by: fx.Node | None = None

    def root(self) -> Dim:
        root = self
        while root._parent is not None:
            root = root._parent
        while self._parent is not None:
            self._parent, self = root, self._parent
        return root

    @property
    def pinned_by(self) -> fx.Node | None:
        return self.root()._pinned_by

    def pin(self, node: fx.Node) -> None:
        root = self.root()
        root._pinned_by = root._pinned_by or node

    def join(self, other: Dim) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b._parent = a
            a._pinned_by = a._pinned_by or b._pinned_by


Dims = tuple[Dim, ...]
_Rule = Callable[["ChannelSpaces", fx.Node], Any]


class ChannelSpaces:
    """The dimensions of a functional ATen graph with static shapes, joined by what it computes.

    Args:
        same: pairs of placeholders that hold one tensor, such as tied weights.
        inputs: placeholders that cannot be permuted.
    """

    def __init__(
        self, graph: fx.Graph, same: Iterable[tuple[fx.Node, fx.Node]], inputs: set[fx.Node]
    ) -> None:
        self.embeddings: list[tuple[fx.Node, Dim]] = []
        self._dims: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            self._dims[node] = self._visit(node)
            if node in inputs:
                self.pin(self._dims[node], node)
        for a, b in same:
            self.join(self.of(a), self.of(b))

    def of(self, node: Any) -> Dims:
        """The dimensions of a tensor node; none of anything else."""
        dims = self._dims.get(node, ()) if isinstance(node, fx.Node) else ()
        return dims if all(isinstance(d, Dim) for d in dims) else ()

    def value(self, node: Any) -> Any:
        return self._dims[node]

    def fresh(self, node: fx.Node) -> Any:
        return _fresh(node.meta.get("val"))

    def join(self, a: Sequence[Dim], b: Sequence[Dim]) -> None:
        for x, y in zip(a, b, strict=True):
            x.join(y)

    def pin(self, dims: Any, node: fx.Node) -> None:
        for dim in _flat(dims):
            dim.pin(node)

    def align(self, node: fx.Node, out: Sequence[Dim], out_shape: Sequence[int]) -> None:
        """Join with what the tensor is broadcast to."""
        shape = _shape(node)
        for dim, size, target, target_size in zip(
            reversed(self.of(node)),
            reversed(shape),
            reversed(out),
            reversed(out_shape),
            strict=False,
        ):
            if same_size(size, target_size):
                dim.join(target)

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder" or node.op == "get_attr":
            return self.fresh(node)
        if node.op == "output":
            for source in node.all_input_nodes:
                self.pin(self._dims[source], node)
            return ()
        if node.target is operator.getitem:
            return self.value(node.args[0])[node.args[1]]
        rule = _rule(node.target)
        return rule(self, node) if rule is not None else _opaque(self, node)


def _fresh(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(Dim() for _ in value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(_fresh(v) for v in value)
    return ()


def _flat(dims: Any) -> Iterable[Dim]:
    if isinstance(dims, Dim):
        yield dims
    else:
        for entry in dims:
            yield from _flat(entry)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _rule(target: Any) -> _Rule | None:
    packet = getattr(target, "overloadpacket", target)
    found = _RULES.get(packet) or _RULES_BY_NAME.get(str(packet))
    tags = getattr(target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    if found is None and torch.Tag.pointwise in tags and not random:
        return _pointwise
    return found


# Rules: each returns the dimensions of the node's result


def _opaque(spaces: ChannelSpaces, node: fx.Node) -> Any:
    out = spaces.fresh(node)
    for source in node.all_input_nodes:
        spaces.pin(spaces.value(source), node)
    spaces.pin(out, node)
    return out


def _pointwise(spaces: ChannelSpaces, node: fx.Node) -> Any:
    if not isinstance(node.meta["val"], Tensor):
        return _opaque(spaces, node)
    out = spaces.fresh(node)
    for source in _tensors(node):
        spaces.align(source, out, _shape(node))
    return out


def _constant(spaces: ChannelSpaces, node: fx.Node) -> Any:
    return spaces.fresh(node)


def _embedding(spaces: ChannelSpaces, node: fx.Node) -> Any:
    weight, ids = node.args[:2]
    rows, channels = spaces.of(weight)
    rows.pin(node)
    spaces.embeddings.append((node, channels))
    return (*spaces.of(ids), channels)


def _linear(spaces: ChannelSpaces, node: fx.Node) -> Any:
    x, weight, *bias = node.args
    rows, columns = spaces.of(weight)
    spaces.of(x)[-1].join(columns)
    for vector in bias:
        spaces.join(spaces.of(vector), (rows,) if vector is not None else ())
    return (*spaces.of(x)[:-1], rows)


def _matmul(spaces: ChannelSpaces, node: fx.Node) -> Any:
    """mm, bmm and matmul of at least two dimensions."""
    a, b = node.args[:2]
    first, second = spaces.of(a), spaces.of(b)
    if len(first) < 2 or len(second) < 2:
        return _opaque(spaces, node)
    first[-1].join(second[-2])
    out = spaces.fresh(node)
    out[-2].join(first[-2])
    out[-1].join(second[-1])
    for dims, source in ((first, a), (second, b)):
        batch, shape = dims[:-2], _shape(source)[:-2]
        for dim, size, target, wanted in zip(
            reversed(batch), reversed(shape), reversed(out[:-2]), reversed(_shape(node)[:-2]),
            strict=False,
        ):  # fmt: skip
            if same_size(size, wanted):
                dim.join(target)
    return out


def _addmm(spaces: ChannelSpaces, node: fx.Node) -> Any:
    bias, a, b = node.args[:3]
    (rows, contracted), (other, columns) = spaces.of(a), spaces.of(b)
    contracted.join(other)
    out = (rows, columns)
    spaces.align(bias, out, _shape(node))  # type: ignore[arg-type]
    return out


def _grouped_mm(spaces: ChannelSpaces, node: fx.Node) -> Any:
    """[T, D] @ [E, D, N], rows of each group with their own matrix."""
    x, weights = spaces.of(node.args[0]), spaces.of(node.args[1])
    if len(x) != 2 or len(weights) != 3:
        return _opaque(spaces, node)
    experts, contracted, columns = weights
    experts.pin(node)
    x[0].pin(node)
    x[1].join(contracted)
    return x[0], columns


def _reduction(spaces: ChannelSpaces, node: fx.Node) -> Any:
    source = node.args[0]
    dims, out = spaces.of(source), node.meta["val"]
    reduced = _reduced(node, len(dims))
    keep = isinstance(out, Tensor) and out.ndim == len(dims) and bool(reduced)
    if not isinstance(out, Tensor):
        return _opaque(spaces, node)
    if keep:
        return tuple(Dim() if i in reduced else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in reduced)


def _reduced(node: fx.Node, ndim: int) -> set[int]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    axes: Any = given.get("dim", given.get("dims"))
    if axes is None or axes == []:
        return set(range(ndim))
    return {int(d) % max(ndim, 1) for d in (axes if isinstance(axes, (list, tuple)) else [axes])}


def _softmax(spaces: ChannelSpaces, node: fx.Node) -> Any:
    return spaces.of(node.args[0])


def _view(spaces: ChannelSpaces, node: fx.Node) -> Any:
    """Dimensions that stay whole are the same; those that are split or merged are pinned."""
    source = node.args[0]
    if not all(isinstance(size, int) for size in (*_shape(source), *_shape(node))):
        return _opaque(spaces, node)
    out = spaces.fresh(node)
    before = [(d, s) for d, s in zip(spaces.of(source), _shape(source), strict=True) if s != 1]
    after = [(d, s) for d, s in zip(out, _shape(node), strict=True) if s != 1]
    while before and after:
        old, new = [before.pop(0)], [after.pop(0)]
        while (a := math.prod(s for _, s in old)) != (b := math.prod(s for _, s in new)):
            (old if a < b else new).append((before if a < b else after).pop(0))
        if len(old) == len(new) == 1:
            old[0][0].join(new[0][0])
        else:
            spaces.pin([d for d, _ in (*old, *new)], node)
    return out


def _permute(spaces: ChannelSpaces, node: fx.Node) -> Any:
    dims = spaces.of(node.args[0])
    order: Any = node.args[1]
    return tuple(dims[i] for i in order)


def _transpose(spaces: ChannelSpaces, node: fx.Node) -> Any:
    dims = list(spaces.of(node.args[0]))
    a, b = (int(d) for d in node.args[1:3]) if len(node.args) > 2 else (0, -1)  # type: ignore[arg-type]
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def _expand(spaces: ChannelSpaces, node: fx.Node) -> Any:
    out = spaces.fresh(node)
    spaces.align(node.args[0], out, _shape(node))  # type: ignore[arg-type]
    return out


def _unsqueeze(spaces: ChannelSpaces, node: fx.Node) -> Any:
    dims = list(spaces.of(node.args[0]))
    at: Any = node.args[1]
    dims.insert(at % (len(dims) + 1), Dim())
    return tuple(dims)


def _along(spaces: ChannelSpaces, node: fx.Node) -> Any:
    """Ops along one dimension, their second argument: it is pinned, the others stay."""
    dims = spaces.of(node.args[0])
    axis = _axis(node, len(dims))
    if node.target is aten.slice.Tensor and _shape(node) == _shape(node.args[0]):
        return dims
    dims[axis].pin(node)
    results = node.meta["val"]
    if isinstance(results, Tensor):
        return _replaced(spaces, dims, axis, results, node)
    return tuple(_replaced(spaces, dims, axis, r, node) for r in results)


def _replaced(spaces: ChannelSpaces, dims: Dims, axis: int, result: Tensor, node: fx.Node) -> Dims:
    if result.ndim == len(dims) - 1:
        return tuple(d for i, d in enumerate(dims) if i != axis)
    own = Dim()
    own.pin(node)
    return tuple(own if i == axis else d for i, d in enumerate(dims))


def _axis(node: fx.Node, ndim: int) -> int:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    axis: Any = given.get("dim", _default_axis(node))
    return int(axis % ndim)


def _default_axis(node: fx.Node) -> int:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return next((a.default_value for a in arguments if a.name == "dim"), 0)


def _cat(spaces: ChannelSpaces, node: fx.Node) -> Any:
    out = spaces.fresh(node)
    axis = _axis(node, len(out))
    for source in _tensors(node):
        dims = spaces.of(source)
        if len(dims) == len(out):
            spaces.join(dims[:axis] + dims[axis + 1 :], out[:axis] + out[axis + 1 :])
            dims[axis].pin(node)
    out[axis].pin(node)
    return out


def _stack(spaces: ChannelSpaces, node: fx.Node) -> Any:
    out = spaces.fresh(node)
    axis = _axis(node, len(out))
    for source in _tensors(node):
        spaces.join(spaces.of(source), out[:axis] + out[axis + 1 :])
    return out


def _index(spaces: ChannelSpaces, node: fx.Node) -> Any:
    """x[indices] with indices of the leading dimensions: the rest stay."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    dims = spaces.of(source)
    if not _selects(indices):
        return _opaque(spaces, node)
    for dim in dims[: len(indices)]:
        dim.pin(node)
    rest = dims[len(indices) :]
    out = spaces.fresh(node)
    leading = out[: len(out) - len(rest)]
    spaces.pin(leading, node)
    return (*leading, *rest)


def _selects(indices: list[Any]) -> bool:
    """Are these integers for each of the leading dimensions?"""
    return all(i is not None and i.meta["val"].dtype != torch.bool for i in indices)


def _index_put(spaces: ChannelSpaces, node: fx.Node) -> Any:
    source, indices, values = node.args[0], list(node.args[1]), node.args[2]  # type: ignore[arg-type]
    dims = spaces.of(source)
    if not _selects(indices):
        return _opaque(spaces, node)
    spaces.pin(dims[: len(indices)], node)
    spaces.align(values, dims, _shape(source))  # type: ignore[arg-type]
    return dims


def _index_add(spaces: ChannelSpaces, node: fx.Node) -> Any:
    """x, dim, index, source."""
    dims, axis = spaces.of(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    axis %= len(dims)
    dims[axis].pin(node)
    source = spaces.of(node.args[3])
    source[axis].pin(node)
    spaces.join(dims[:axis] + dims[axis + 1 :], source[:axis] + source[axis + 1 :])
    return dims


def _layer_norm(spaces: ChannelSpaces, node: fx.Node) -> Any:
    """x, normalised shape, weight, bias, eps -> y and statistics; RMS norms have no bias."""
    x, shape = spaces.of(node.args[0]), node.args[1]
    normalised = x[len(x) - len(shape) :]  # type: ignore[arg-type]
    for vector in node.args[2:4]:
        if isinstance(vector, fx.Node):
            spaces.join(spaces.of(vector), normalised)
    return (x, *spaces.fresh(node)[1:])


_A, _P = aten, prims
_RULES: dict[Any, _Rule] = {
    _A.embedding: _embedding,
    _A.linear: _linear,
    _A.addmm: _addmm,
    _A.native_layer_norm: _layer_norm,
    _A._fused_rms_norm: _layer_norm,
    _A.permute: _permute,
    _A.expand: _expand,
    _A.unsqueeze: _unsqueeze,
    _A.cat: _cat,
    _A.stack: _stack,
    _A.index: _index,
    _A.index_put: _index_put,
    _A.index_add: _index_add,
    _A._grouped_mm: _grouped_mm,
    **dict.fromkeys((_A.mm, _A.bmm, _A.matmul), _matmul),
    **dict.fromkeys((_A.transpose, _A.t), _transpose),
    **dict.fromkeys((_A._softmax, _A.softmax, _A._log_softmax, _A.log_softmax), _softmax),
    **dict.fromkeys((_A.view, _A._unsafe_view, _A.reshape, _A.squeeze), _view),
    **dict.fromkeys(
        (_A.sum, _A.mean, _A.amax, _A.amin, _A.var, _A.linalg_vector_norm, _A.logsumexp, _A.any),
        _reduction,
    ),
    **dict.fromkeys(
        (_A.slice, _A.select, _A.split, _A.split_with_sizes, _A.chunk, _A.unbind, _A.cumsum,
         _A.topk, _A.sort, _A.index_select),
        _along,
    ),
    **dict.fromkeys(
        (_A.clone, _A.alias, _A.detach, _A._to_copy, _A.to, _A.contiguous, _A.lift_fresh_copy,
         _A.type_as, _P.convert_element_type),
        _pointwise,
    ),
    **dict.fromkeys(
        (_A.full, _A.full_like, _A.zeros, _A.zeros_like, _A.ones, _A.ones_like, _A.new_zeros,
         _A.new_ones, _A.new_full, _A.scalar_tensor),
        _constant,
    ),
}  # fmt: skip
# Ops of other packages, which need not be there.
_RULES_BY_NAME: dict[str, _Rule] = {"transformers.grouped_mm_fallback": _grouped_mm}
