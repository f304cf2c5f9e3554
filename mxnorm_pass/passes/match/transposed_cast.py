"""Find the backward's MX casts of a norm's output along T.

A weight gradient contracts the rows, so that its operand has its blocks along them::

    norm output [.., D] -> [T, D] -> transpose [D, T] -> blocks [D, T / B, B] -> cast

The forward's fused op has those elements in hand and can make this cast with the other one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass.graph.nodes import (
    dtype_of,
    is_dtype_cast,
    is_transpose,
    is_view,
    same_size,
    tensor_of,
)
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES
from mxnorm_pass.passes.match.casts.find import Cast, casts_of
from mxnorm_pass.passes.match.linears.readers import narrowest_dtype
from mxnorm_pass.passes.match.norms.find import Norm

Read = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class TransposedCast:
    """A backward cast of the norm's output along T.

    Attributes:
        cast: its values are [D, T] and its scales [D, T / B], row-major.
        rounds_to: dtype to which the output is rounded on its way to the cast.
    """

    cast: Cast
    rounds_to: torch.dtype


def transposed_casts(norm: Norm, reads: Iterable[Read]) -> list[TransposedCast]:
    """The casts along T among what backward readers make of the norm's output.

    Left out are those of a symbolic T, of blocks that reach from one channel into the next, and
    those with results in another layout than a fused op's.

    Args:
        reads: (node that holds the output, maybe reshaped; its backward reader).
    """
    found: list[TransposedCast] = []
    for _, reader in reads:
        pending = [reader]
        while pending:
            node = pending.pop()
            if not _is_step(node):
                continue
            pending += node.users
            way = _way_from(norm.output, node)
            rounds_to = narrowest_dtype((norm.output, *way))
            if rounds_to is not None:
                casts = [c for c in casts_of(node) if _is_along_rows(c, way, norm.width)]
                found += [TransposedCast(cast, rounds_to) for cast in casts]
    return found


def without_casts(reads: Iterable[Read], casts: Iterable[Cast]) -> list[Read]:
    """Those of the reads of which something is left once the casts are taken out."""
    inside = {node for cast in casts for node in cast.nodes}

    def ends_inside(node: fx.Node) -> bool:
        if node in inside:
            return True
        return _is_step(node) and bool(node.users) and all(map(ends_inside, node.users))

    return [(read, reader) for read, reader in reads if not ends_inside(reader)]


def _is_step(node: fx.Node) -> bool:
    """Does the node keep the elements, in an order that can be told?"""
    if is_view(node) or is_transpose(node):
        return True
    return is_dtype_cast(node) and dtype_of(node) not in ELEMENT_DTYPES


def _way_from(output: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The steps from ``output`` (excluded) to ``node``."""
    way: list[fx.Node] = []
    while node is not output:
        way.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return way[::-1]


def _is_along_rows(cast: Cast, way: Iterable[fx.Node], width: int) -> bool:
    transposes = [node for node in way if is_transpose(node)]
    if len(transposes) != 1:
        return False
    value = tensor_of(transposes[0])
    assert value is not None
    channels, rows = value.shape
    if not isinstance(rows, int) or not same_size(channels, width):
        return False
    return rows % cast.format.block_size == 0 and _is_contiguous(cast)


def _is_contiguous(cast: Cast) -> bool:
    """What a fused op returns is, and matmuls may ask for a layout."""
    results = (tensor_of(cast.values), tensor_of(cast.scales))
    return all(t is not None and t.is_contiguous() for t in results)
