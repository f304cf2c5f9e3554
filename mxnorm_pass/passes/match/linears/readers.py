"""Who reads a norm's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass.graph.nodes import aten, forward_users, is_dtype_cast, is_view, tensor_of
from mxnorm_pass.passes.match.casts.find import Cast


@dataclass(frozen=True)
class Reader:
    """A way in which the graph reads a norm's output.

    Attributes:
        path: nodes from the norm's output (excluded) to what is read: views and dtype casts.
        node: the node that reads; for a cast, its values.
        cast: the recognised MX cast of the output, None for any other reader.
    """

    path: tuple[fx.Node, ...]
    node: fx.Node
    cast: Cast | None = None


@dataclass(frozen=True)
class CastIndex:
    """The casts of a graph by the node whose elements they cast."""

    by_source: Mapping[fx.Node, tuple[Cast, ...]]
    by_values: Mapping[fx.Node, Cast]

    @classmethod
    def of(cls, casts: Iterable[Cast]) -> CastIndex:
        by_source: dict[fx.Node, tuple[Cast, ...]] = {}
        by_values: dict[fx.Node, Cast] = {}
        for cast in casts:
            by_source[cast.source] = (*by_source.get(cast.source, ()), cast)
            by_values[cast.values] = cast
        return cls(by_source, by_values)


def readers(output: fx.Node, casts: CastIndex) -> list[Reader]:
    """Every forward reader of ``output``'s elements, seen through views and float dtype casts."""
    found: list[Reader] = []
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(output, ())]
    while pending:
        node, path = pending.pop(0)
        at_node = casts.by_source.get(node, ())
        found += [Reader(path, cast.values, cast) for cast in at_node]
        for user in forward_users(node):
            if user.target is aten.sym_size.int or any(user in cast.nodes for cast in at_node):
                continue
            if is_view(user) or (is_dtype_cast(user) and not is_float8(user)):
                pending.append((user, (*path, user)))
            else:
                found.append(Reader(path, user))
    return found


def is_float8(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype.itemsize == 1


def narrowest_dtype(nodes: Iterable[fx.Node]) -> torch.dtype | None:
    """The one dtype below float32 among the nodes', float32 without any, None for several."""
    narrow = {t.dtype for t in map(tensor_of, nodes) if t is not None} - {torch.float32}
    return next(iter(narrow), torch.float32) if len(narrow) <= 1 else None
