"""Find every RMSNorm of a graph by what it computes.

From each sum of squares the statistic is followed forward as (scale * sum(x^2) + eps) ^ power,
whatever ops spell it, until it multiplies or divides the very x it was taken from. The walk then
goes on through the gain and the dtype casts to the norm's output::

    x -> float32 -> square -> mean -> + eps -> rsqrt -> * x -> dtype -> * gain -> dtype -> output

A norm that was made to estimate its RMS before the graph was differentiated has
``mxnorm_pass::inverse_rms`` in the place of the mean and all up to rsqrt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph_code import call_text
from mxnorm_pass.graph_utils import (
    aten,
    dtype_of,
    forward_users,
    is_backward,
    is_call,
    is_dtype_cast,
    is_expand,
    is_view,
    same_shape,
    same_value,
    strip,
    tensor_of,
)
from mxnorm_pass.match.layer_norm import is_centered
from mxnorm_pass.match.norm_tail import Rounding, Tail, follow_output, rounding_skip
from mxnorm_pass.match.skip import Skip
from mxnorm_pass.match.statistic import (
    ADDS,
    FACTORS,
    Statistic,
    follow,
    is_narrowing,
    is_per_channel,
)
from mxnorm_pass.module_names import module_path
from mxnorm_pass.report import SkipReason

_MEANS = frozenset({aten.mean.dim})
_SUMS = frozenset({aten.sum.dim_IntList})
_VECTOR_NORMS = frozenset({aten.linalg_vector_norm.default})
_SUPPORTED_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: output = x / sqrt(mean(x^2) + eps) * gain.

    Attributes:
        name: dotted module name; the anchor's node name outside of any module.
        anchor: the reduction it was found by.
        x: [..., D], before any upcast.
        output: [..., D], after gain and dtype casts.
        product: [..., D], after the gain and before the dtype casts behind it.
        gain: a node of D elements, None for a norm without one.
        rounding: a Skip where the norm rounds in a way that the fused op cannot repeat.
        nodes: the forward nodes from x (excluded) to output (included).
        problem: why the norm cannot be rewritten, whoever reads it.
        eps_input: the graph input that eps is, None where it is a constant.
        estimated: its 1 / rms is the estimate already, and ``anchor`` is what computes it.
    """

    name: str
    anchor: fx.Node
    x: fx.Node
    output: fx.Node
    product: fx.Node
    width: int
    eps: float
    gain: fx.Node | None
    rounding: Rounding | Skip
    nodes: frozenset[fx.Node]
    problem: Skip | None = None
    eps_input: fx.Node | None = None
    estimated: bool = False


@dataclass(frozen=True)
class _SumOfSquares:
    """The reduction that a norm starts from."""

    statistic: Statistic
    squared: fx.Node
    squares: fx.Node | None
    dims: tuple[int, ...]


@dataclass(frozen=True)
class _Normalization:
    """The node that divides x by its RMS.

    Attributes:
        gain: where it is applied to x or to 1 / rms, and so before they meet.
        scaled: the node that applies it to x.
    """

    node: fx.Node
    statistic: Statistic
    x: fx.Node
    gain: fx.Node | None = None
    scaled: fx.Node | None = None


def find_norms(graph: fx.Graph) -> list[Norm]:
    """All RMSNorms of the forward graph, in graph order."""
    norms = []
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node):
            continue
        start = _sum_of_squares(node)
        found = _normalization(start) if start is not None else None
        if start is not None and found is not None:
            norms.append(_norm(start, found))
    return norms


def _sum_of_squares(node: fx.Node) -> _SumOfSquares | None:
    if node.target is ops.inverse_rms:
        return _estimate(node)
    if not is_call(node, _MEANS | _SUMS | _VECTOR_NORMS) or tensor_of(node) is None:
        return None
    reduced = node.args[0]
    dims_position = 2 if node.target in _VECTOR_NORMS else 1
    dims = node.args[dims_position] if len(node.args) > dims_position else None
    source = tensor_of(reduced) if isinstance(reduced, fx.Node) else None
    if source is None or not isinstance(dims, (list, tuple)) or not dims:
        return None
    dims = tuple(sorted(int(d) % source.ndim for d in dims))
    count = math.prod(s for s in (source.shape[d] for d in dims) if isinstance(s, int))
    if node.target in _VECTOR_NORMS:
        order = node.args[1] if len(node.args) > 1 else 2
        squared = reduced if order == 2 else None
        squares = None
    else:
        squares = strip(reduced, is_view)  # type: ignore[arg-type]
        squared = _squared(squares)
    if not isinstance(squared, fx.Node):
        return None
    statistic = Statistic(
        node,
        scale=1 / count if node.target in _MEANS else 1.0,
        eps=0.0,
        power=0.5 if node.target in _VECTOR_NORMS else 1.0,
        trail=(node,),
    )
    return _SumOfSquares(statistic, squared, squares, dims)


def _estimate(node: fx.Node) -> _SumOfSquares:
    """1 / rms by estimate, as if it came from a sum of squares."""
    x, _, eps, *_ = node.args
    value = tensor_of(x)  # type: ignore[arg-type]
    assert value is not None
    statistic = Statistic(node, scale=1 / value.shape[-1], eps=eps, power=-0.5, trail=(node,))  # type: ignore[arg-type]
    return _SumOfSquares(statistic, x, None, (value.ndim - 1,))  # type: ignore[arg-type]


def _squared(node: fx.Node) -> fx.Node | None:
    """z where the node is z^2."""
    if is_call(node, (aten.pow.Tensor_Scalar,)) and node.args[1] in (2, 2.0):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if is_call(node, (aten.square.default,)):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if is_call(node, (aten.mul.Tensor,)) and node.args[0] is node.args[1]:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    return None


def _normalization(start: _SumOfSquares) -> _Normalization | None:
    """Follow the statistic to the node that scales x by 1 / rms."""
    root = strip(start.squared, is_view, is_dtype_cast)
    for statistic, user in follow(start.statistic):
        operand = _scaled_by(user, statistic)
        if operand is None or not _broadcasts_over(start.dims, statistic, operand):
            continue
        if same_value(strip(operand, is_view, is_dtype_cast), root):
            return _Normalization(user, statistic, operand, statistic.gain)
        x, gain = _without_gain(operand)
        if statistic.gain is None and same_value(strip(x, is_view, is_dtype_cast), root):
            return _Normalization(user, statistic, x, gain, operand)
    return None


def _without_gain(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """x and gain where the node is x * gain; else the node alone."""
    if is_call(node, (aten.mul.Tensor,)):
        for x, gain in (node.args[:2], node.args[1::-1]):
            value = tensor_of(x) if isinstance(x, fx.Node) else None
            if value is not None and value.ndim > 1 and is_per_channel(gain, value.shape[-1]):
                return x, gain  # type: ignore[return-value]
    return node, None


def _broadcasts_over(dims: tuple[int, ...], statistic: Statistic, x: fx.Node) -> bool:
    """Does each row's statistic meet its own row, and not the row it broadcasts to?"""
    own, value = tensor_of(strip(statistic.per_row, is_expand)), tensor_of(x)
    if own is None or value is None or own.ndim != value.ndim:
        return False
    expected = [1 if d in dims else size for d, size in enumerate(value.shape)]
    return same_shape(own.shape, expected)


def _scaled_by(user: fx.Node, statistic: Statistic) -> fx.Node | None:
    """The tensor that ``user`` multiplies by 1 / rms, given the statistic."""
    if len(user.args) < 2 or not all(isinstance(a, fx.Node) for a in user.args[:2]):
        return None
    first, second = user.args[:2]
    if user.target is aten.mul.Tensor and math.isclose(statistic.power, -0.5):
        return second if first is statistic.node else first  # type: ignore[return-value]
    if user.target is aten.div.Tensor and math.isclose(statistic.power, 0.5):
        return first if second is statistic.node else None  # type: ignore[return-value]
    return None


def _norm(start: _SumOfSquares, found: _Normalization) -> Norm:
    value = tensor_of(start.squared)
    assert value is not None
    width = value.shape[-1]
    upcasts = _exclusive_upcasts(start, found)
    x: fx.Node = upcasts[0].args[0] if upcasts else found.x  # type: ignore[assignment]
    tail = follow_output(found.node, width, found.gain)
    statistic = found.statistic
    nodes = {found.node, *upcasts, *statistic.trail, *tail.nodes}
    nodes |= {n for n in (start.squares, found.scaled) if n is not None}
    anchor = start.statistic.node
    estimated = anchor.target is ops.inverse_rms
    rounding = tail.rounding if estimated else next(_inexact(start, found), tail.rounding)
    return Norm(
        name=module_path(anchor) or anchor.name,
        anchor=anchor,
        x=x,
        output=tail.output,
        product=tail.product,
        width=width if isinstance(width, int) else -1,
        eps=statistic.eps,
        gain=tail.gain,
        rounding=rounding,
        nodes=frozenset(nodes),
        problem=_problem(start, found, x, tail),
        eps_input=_eps_input(statistic),
        estimated=estimated,
    )


def _is_upcast(node: fx.Node) -> bool:
    return is_dtype_cast(node) and not is_narrowing(node)


def _exclusive_upcasts(start: _SumOfSquares, found: _Normalization) -> tuple[fx.Node, ...]:
    """The casts between x and what is squared or scaled, if they lose nothing.

    Such a cast serves the norm alone. The mean may read float32 where the product reads x itself.
    """
    operands = tuple(dict.fromkeys((start.squared, found.x)))
    readers = {found.node, found.scaled, start.squares, start.statistic.node}
    casts = tuple(
        node for node in operands if _is_upcast(node) and readers.issuperset(forward_users(node))
    )
    sources = {node.args[0] if node in casts else node for node in operands}
    return casts if len(sources) == 1 else ()


def _inexact(start: _SumOfSquares, found: _Normalization) -> Iterator[Skip]:
    """Where the norm is not x * rsqrt(mean(x^2) + eps) in float32, which the fused op repeats."""
    mean, statistic = start.statistic.node, found.statistic
    if strip(start.squared, _is_upcast) is not strip(found.x, _is_upcast):
        yield rounding_skip(found.x, f"{start.squared.name}, which is squared")
    for node in (start.squared, start.squares, mean, statistic.node):
        if node is not None and dtype_of(node) != torch.float32:
            yield rounding_skip(node, "f32")
    if mean.target not in _MEANS:
        yield rounding_skip(mean, "aten.mean.dim")
    rounded = (n for n in statistic.trail if is_dtype_cast(n) and is_narrowing(n))
    for node in rounded if statistic.rounded else ():
        yield rounding_skip(node, "1 / rms in f32 throughout")
    adds = [n for n in statistic.trail if n.target in ADDS]
    if len(adds) > 1 or len(statistic.trail) > 3:
        detour = (n for n in statistic.trail[1:] if n not in adds[:1])
        yield rounding_skip(next(detour), "aten.rsqrt of mean + eps and nothing else")
    if statistic.node.target is not aten.rsqrt.default:
        yield rounding_skip(statistic.node, "aten.rsqrt")
    if found.gain is not None:
        yield rounding_skip(found.scaled or statistic.node, "the gain after x / rms")


def _eps_input(statistic: Statistic) -> fx.Node | None:
    eps = statistic.eps_input
    return None if eps is None else strip(eps, is_view, is_dtype_cast)


def _problem(start: _SumOfSquares, found: _Normalization, x: fx.Node, tail: Tail) -> Skip | None:
    """Why the norm cannot be rewritten, whoever reads it; what stands first in the graph."""
    value, anchor = tensor_of(start.squared), start.statistic.node
    assert value is not None
    if is_centered(start.squared):
        centered = strip(start.squared, is_view, is_dtype_cast)
        return Skip(SkipReason.LAYER_NORM, "x - mean(x) is normalised", centered, "x itself")
    last = value.ndim - 1
    if start.dims != (last,):
        detail = f"a mean over dim {', '.join(map(str, start.dims))} of {value.ndim}"
        return Skip(SkipReason.NORM_DIMENSION, detail, anchor, f"a mean over dim {last} alone")
    width = value.shape[-1]
    if not isinstance(width, int):
        detail = f"width {width} is not static"
        return Skip(SkipReason.WIDTH, detail, anchor, "a constant width")
    form = _form_problem(found.statistic, width)
    if form is not None:
        return form
    dtype = dtype_of(x)
    if dtype not in _SUPPORTED_INPUTS:
        supported = ", ".join(map(str, _SUPPORTED_INPUTS))
        return Skip(SkipReason.DTYPE, f"the norm reads {dtype}", x, f"one of {supported}")
    return tail.problem


def _form_problem(statistic: Statistic, width: int) -> Skip | None:
    """Where the statistic is not (sum(x^2) / width + eps) to a power, with a constant eps."""
    if statistic.eps_input is not None:
        add = next(n for n in statistic.trail if statistic.eps_input in n.args)
        detail = f"eps is {call_text(_eps_input(statistic) or add)}"
        return Skip(SkipReason.EPS_INPUT, detail, add, "a constant eps")
    outside = statistic.eps_outside_root
    if outside is not None:
        expected = "eps inside the root, mean(x^2) + eps"
        return Skip(SkipReason.NORM_FORM, "eps is added outside the root", outside, expected)
    if not 0 <= statistic.eps < math.inf:
        detail = f"eps is {statistic.eps:g}"
        return Skip(SkipReason.NORM_FORM, detail, statistic.last(ADDS), "a finite eps >= 0")
    if not math.isclose(statistic.scale * width, 1.0, rel_tol=1e-5):
        detail = f"sum(x^2) is scaled by {statistic.scale:g}, not by 1/{width}"
        return Skip(SkipReason.NORM_FORM, detail, statistic.last(FACTORS), f"sum(x^2) / {width}")
    return None
