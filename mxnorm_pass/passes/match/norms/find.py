"""Find every RMSNorm of a graph by what it computes.

From each sum of squares the statistic is followed forward as (scale * sum(x^2) + eps) ^ power,
whatever ops spell it, until it multiplies or divides the very x it was taken from. The walk then
goes on through the gain and the dtype casts to the norm's output::

    x -> float32 -> square -> mean -> + eps -> rsqrt -> * x -> dtype -> * gain -> dtype -> output

That reads eps and all roundings off the nodes. A norm that was made to estimate its RMS before the
graph was differentiated has ``mxnorm_pass::inverse_rms`` in the place of the mean and all up to
rsqrt. Whatever else divides a tensor by the norm of its rows is found by evaluation, see
``scaling``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.graph.code import call_text
from mxnorm_pass.graph.constants import float_inputs
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import (
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
from mxnorm_pass.passes.match.norms.inverse_rms import (
    ADDS,
    FACTORS,
    Statistic,
    follow,
    is_narrowing,
    is_per_channel,
)
from mxnorm_pass.passes.match.norms.layer_norm import centered
from mxnorm_pass.passes.match.norms.row_program import RowProgram
from mxnorm_pass.passes.match.norms.scaling import Scaling, find_scalings
from mxnorm_pass.passes.match.norms.start import Start, find_start
from mxnorm_pass.passes.match.norms.tail import Rounding, Tail, follow_output, is_one, rounding_skip
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason

_BOUNDS = frozenset(
    {
        aten.clamp.default,
        aten.clamp.Tensor,
        aten.clamp_min.default,
        aten.clamp_min.Tensor,
        aten.maximum.default,
        aten.where.self,
    }
)
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
        float_inputs: the Python floats among the graph's inputs that eps or a factor depends on.
        is_rms_norm: 1 / rms has no factor but the gain, or is at least meant as one. What is not
            may be any number, such as the cosine of an angle, unless a linear or a cast reads it.
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
    float_inputs: tuple[fx.Node, ...] = ()
    is_rms_norm: bool = True
    estimated: bool = False


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
    norms, products = [], set()
    for node in graph.nodes:
        start = find_start(node) if not is_backward(node) else None
        found = _normalization(start) if start is not None else None
        if start is not None and found is not None:
            norms.append(_norm(start, found))
            products.add(found.node)
    known = _nodes_of_rms_norms(norms)
    norms += map(_norm_of_scaling, find_scalings(graph, known | products))
    # Derivatives divide by an RMSNorm's numbers once more.
    known = _nodes_of_rms_norms(norms)
    counted = (norm for norm in norms if norm.is_rms_norm or known.isdisjoint(norm.nodes))
    return sorted(counted, key=lambda norm: norm.anchor)


def _nodes_of_rms_norms(norms: Iterable[Norm]) -> set[fx.Node]:
    return {node for norm in norms if norm.is_rms_norm for node in norm.nodes}


def _normalization(start: Start) -> _Normalization | None:
    """Follow the statistic to the node that scales x by 1 / rms."""
    root = strip(start.squared, is_view, is_dtype_cast)
    for statistic, user in follow(start.statistic):
        operand = _scaled_by(user, statistic)
        if operand is None or not _broadcasts_over(start, statistic, operand):
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


def _broadcasts_over(start: Start, statistic: Statistic, x: fx.Node) -> bool:
    """Does each row's statistic meet its own row, and not the row it broadcasts to?"""
    own, value = tensor_of(strip(statistic.per_row, is_expand)), tensor_of(x)
    if own is None or value is None or not same_shape(start.shape, value.shape):
        return False
    expected = [1 if d in start.dims else size for d, size in enumerate(value.shape)]
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


def _norm(start: Start, found: _Normalization) -> Norm:
    value = tensor_of(start.squared)
    assert value is not None
    width = value.shape[-1]
    upcasts = _exclusive_upcasts(start, found)
    x: fx.Node = upcasts[0].args[0] if upcasts else found.x  # type: ignore[assignment]
    statistic = found.statistic
    mean_scale = statistic.scale * start.count
    factor = mean_scale**-0.5 if mean_scale > 0 else math.inf
    tail = follow_output(found.node, width, found.gain, factor)
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
        eps=statistic.eps if is_one(factor) else statistic.eps * factor**2,
        gain=tail.gain,
        rounding=rounding,
        nodes=frozenset(nodes),
        problem=_problem(start, found, x, tail),
        float_inputs=(*float_inputs(statistic.eps_input), *tail.float_inputs),
        is_rms_norm=is_one(tail.factor) or bool(tail.float_inputs),
        estimated=estimated,
    )


def _norm_of_scaling(scaling: Scaling) -> Norm:
    product, x = scaling.product, scaling.x
    width = _width(x)
    gain = scaling.gains[0] if scaling.gains else None
    tail = follow_output(product, width, gain, scaling.inverse.factor)
    nodes = {*scaling.nodes, *tail.nodes}
    while _is_upcast(x) and nodes.issuperset(forward_users(x)):
        nodes.add(x)
        x = x.args[0]  # type: ignore[assignment]
    inputs = [i for n in (*scaling.inputs, *tail.float_inputs) for i in float_inputs(n)]
    is_rms_norm = is_one(tail.factor) and scaling.inverse.guard != "other"
    return Norm(
        name=module_path(scaling.number) or scaling.anchor.name,
        anchor=scaling.anchor,
        x=x,
        output=tail.output,
        product=tail.product,
        width=width if isinstance(width, int) else -1,
        eps=scaling.inverse.eps,
        gain=tail.gain,
        rounding=rounding_skip(product, "x * rsqrt(mean(x^2) + eps) and nothing else"),
        nodes=frozenset(nodes),
        problem=_problem_of_scaling(scaling, x, tail),
        float_inputs=tuple(inputs),
        is_rms_norm=is_rms_norm or bool(inputs) or scaling.operand.linear is not None,
    )


def _width(x: fx.Node) -> Any:
    value = tensor_of(x)
    assert value is not None
    return value.shape[-1]


def _is_upcast(node: fx.Node) -> bool:
    return is_dtype_cast(node) and not is_narrowing(node)


def _exclusive_upcasts(start: Start, found: _Normalization) -> tuple[fx.Node, ...]:
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


def _inexact(start: Start, found: _Normalization) -> Iterator[Skip]:
    """Where the norm is not x * rsqrt(mean(x^2) + eps) in float32, which the fused op repeats."""
    mean, statistic = start.statistic.node, found.statistic
    if strip(start.squared, _is_upcast) is not strip(found.x, _is_upcast):
        yield rounding_skip(found.x, f"{start.squared.name}, which is squared")
    for node in (start.squared, start.squares, mean, statistic.node):
        if node is not None and dtype_of(node) != torch.float32:
            yield rounding_skip(node, "f32")
    if not start.is_mean:
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


def _problem(start: Start, found: _Normalization, x: fx.Node, tail: Tail) -> Skip | None:
    """Why the norm cannot be rewritten, whoever reads it; what stands first in the graph."""
    value, anchor = tensor_of(start.squared), start.statistic.node
    assert value is not None
    if centered(start.squared) is not None:
        return _layer_norm(start.squared)
    last = value.ndim - 1
    if start.dims != (last,):
        detail = f"a mean over dim {', '.join(map(str, start.dims))} of {value.ndim}"
        return Skip(SkipReason.NORM_DIMENSION, detail, anchor, f"a mean over dim {last} alone")
    width = value.shape[-1]
    form = _form_problem(found.statistic, width, tail)
    return _first(_width_problem(width, anchor), form, _dtype_problem(x), tail.problem)


def _problem_of_scaling(scaling: Scaling, x: fx.Node, tail: Tail) -> Skip | None:
    linear = scaling.operand.linear
    if linear is not None:
        detail = f"{call_text(linear)} is divided by the norm of what it reads"
        return Skip(SkipReason.AFTER_LINEAR, detail, scaling.product, "the norm before the linear")
    if scaling.is_centered:
        return _layer_norm(scaling.x)
    width = _width_problem(_width(x), scaling.product)
    return _first(width, _guard_problem(scaling, tail), _dtype_problem(x), tail.problem)


def _first(*problems: Skip | None) -> Skip | None:
    return next((problem for problem in problems if problem is not None), None)


def _layer_norm(x: fx.Node) -> Skip:
    difference = strip(x, is_view, is_dtype_cast)
    return Skip(SkipReason.LAYER_NORM, "x - mean(x) is normalised", difference, "x itself")


def _width_problem(width: Any, node: fx.Node) -> Skip | None:
    if isinstance(width, int):
        return None
    detail = f"width {width} is not static"
    return Skip(SkipReason.WIDTH, detail, node, "a constant width")


def _dtype_problem(x: fx.Node) -> Skip | None:
    dtype = dtype_of(x)
    if dtype in _SUPPORTED_INPUTS:
        return None
    supported = ", ".join(map(str, _SUPPORTED_INPUTS))
    return Skip(SkipReason.DTYPE, f"the norm reads {dtype}", x, f"one of {supported}")


def _form_problem(statistic: Statistic, width: int, tail: Tail) -> Skip | None:
    """Where the statistic is not (sum(x^2) / width + eps) to a power, with a constant eps."""
    if statistic.eps_input is not None:
        add = next(n for n in statistic.trail if statistic.eps_input in n.args)
        detail = f"eps is {call_text(strip(statistic.eps_input, is_view, is_dtype_cast))}"
        return Skip(SkipReason.EPS_INPUT, detail, add, "a constant eps")
    if tail.float_inputs:
        return _factor_input(tail)
    outside = statistic.eps_outside_root
    if outside is not None:
        expected = "eps inside the root, mean(x^2) + eps"
        return Skip(SkipReason.NORM_FORM, "eps is added outside the root", outside, expected)
    if not 0 <= statistic.eps < math.inf:
        detail = f"eps is {statistic.eps:g}"
        return Skip(SkipReason.NORM_FORM, detail, statistic.last(ADDS), "a finite eps >= 0")
    if is_one(tail.factor):
        return None
    detail = f"sum(x^2) is scaled by {statistic.scale:g}, not by 1/{width}"
    return Skip(SkipReason.NORM_FORM, detail, statistic.last(FACTORS), f"sum(x^2) / {width}")


def _guard_problem(scaling: Scaling, tail: Tail) -> Skip | None:
    """Where the scaling is not x / sqrt(mean(x^2) + eps), with a constant eps."""
    inverse, product, program = scaling.inverse, scaling.product, scaling.program
    expected = "x / sqrt(mean(x^2) + eps)"
    if scaling.inputs:
        names = ", ".join(map(call_text, scaling.inputs))
        detail = f"eps or a factor is {names}"
        return Skip(SkipReason.EPS_INPUT, detail, product, "a constant")
    if tail.float_inputs:
        return _factor_input(tail)
    if inverse.guard == "other":
        detail = "x is divided by another function of its norm"
        return Skip(SkipReason.NORM_FORM, detail, _bound(program) or product, expected)
    if not is_one(tail.factor):
        detail = f"x / rms is multiplied by {tail.factor:g}"
        return Skip(SkipReason.NORM_FORM, detail, product, f"{expected} and no factor but the gain")
    if len(scaling.gains) > 1:
        detail = "x / rms is multiplied by two gains"
        return Skip(SkipReason.NORM_FORM, detail, product, f"{expected} and one gain")
    if inverse.guard == "clamped":
        detail = f"eps by clamp, not added: rms is at least {inverse.eps:g}"
        return Skip(SkipReason.NORM_FORM, detail, _bound(program) or product, expected)
    if inverse.guard == "outside":
        return Skip(SkipReason.NORM_FORM, "eps is added outside the root", product, expected)
    return None


def _factor_input(tail: Tail) -> Skip:
    names = ", ".join(map(call_text, tail.float_inputs))
    return Skip(SkipReason.EPS_INPUT, f"a factor is {names}", tail.output, "a constant")


def _bound(program: RowProgram) -> fx.Node | None:
    """The node that keeps a small number per row from being what it is."""
    return next((node for node in program.nodes if is_call(node, _BOUNDS)), None)
