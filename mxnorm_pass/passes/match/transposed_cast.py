"""Find the backward's MX casts of a norm's output along T.

A weight gradient contracts the rows, so that its operand has its blocks along them::

    norm output [.., D] -> [T, D] -> transpose [D, T] -> blocks [D, T / B, B] -> cast

The forward's fused op has those elements in hand and can make this cast with the other one, in
another format, too, transformed and rounded at random, as recipes ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.nodes import (
    dtype_of,
    is_dtype_cast,
    is_transpose,
    is_view,
    same_size,
    tensor_of,
)
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import Use
from mxnorm_pass.numerics.recipe import OperandCast
from mxnorm_pass.numerics.recipe_text import operand_of_text, operand_text
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
        operand: what is computed; None for a cast to nearest whose format says it.
        drawn: node of the seed, key and key of the right operand, of ``operand_cast``.
    """

    cast: Cast
    rounds_to: torch.dtype
    operand: Operand | None = None
    drawn: tuple[Any, ...] = (None, 0, 0)

    def is_that_of(self, other: TransposedCast) -> bool:
        """Are their values and scales equal?"""
        same = (self.cast.format, self.operand, self.drawn)
        return same == (other.cast.format, other.operand, other.drawn)

    def arguments(self) -> tuple[Any, ...]:
        """Of the fused op, where it casts along T otherwise than along D."""
        plain = Operand(OperandCast(self.cast.format), None, "wgrad", Use.RIGHT)
        return *self.drawn, operand_text(self.operand or plain)


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
                casts = (*_plain(node, rounds_to), *_of_recipes(node, rounds_to))
                found += [t for t in casts if _is_along_rows(t.cast, way, norm.width)]
    return found


def _plain(node: fx.Node, rounds_to: torch.dtype) -> Iterator[TransposedCast]:
    for cast in casts_of(node):
        if not cast.square_blocks:
            yield TransposedCast(cast, rounds_to)


def _of_recipes(node: fx.Node, rounds_to: torch.dtype) -> Iterator[TransposedCast]:
    for user in node.users:
        if user.target is not ops.operand_cast:
            continue
        results = {getitem.args[1]: getitem for getitem in user.users}
        if set(results) != {0, 1}:
            continue
        _, *drawn, text, tensor_scale = user.args
        operand = operand_of_text(text)  # type: ignore[arg-type]
        fmt = operand.cast.format
        if fmt is not None and tensor_scale is None and not operand.cast.square_blocks:
            nodes = frozenset((user, *user.users))
            cast = Cast(node, results[0], results[1], fmt, nodes)
            yield TransposedCast(cast, rounds_to, operand, tuple(drawn))


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
