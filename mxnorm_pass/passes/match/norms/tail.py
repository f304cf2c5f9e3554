"""Follow a normalised x through gain and dtype casts to what the norm's readers see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from mxnorm_pass.graph.code import call_text
from mxnorm_pass.graph.constants import constant_of, float_inputs
from mxnorm_pass.graph.nodes import (
    aten,
    dtype_of,
    forward_users,
    is_call,
    is_dtype_cast,
    is_view,
    same_shape,
    strip,
    tensor_of,
)
from mxnorm_pass.passes.match.norms.inverse_rms import DIVISIONS, FACTORS, is_per_channel
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason


@dataclass(frozen=True)
class Rounding:
    """Where the norm leaves float32: before the gain, and at the output (see ``functional``)."""

    norm_dtype: torch.dtype | None
    out_dtype: torch.dtype


@dataclass(frozen=True)
class Tail:
    """The end of a norm.

    Attributes:
        output: what its readers see.
        product: x / rms with gain and factors applied, before any dtype cast behind them.
        gain: [D], None where none is met.
        factor: by which number x / rms is multiplied.
        float_inputs: the graph inputs from which another such number is computed.
        rounding: a Skip where the fused op cannot repeat it.
        nodes: from the normalised x (excluded) to ``output`` (included).
        problem: a parameter scales the norm without having one element per channel.
    """

    output: fx.Node
    product: fx.Node
    gain: fx.Node | None
    rounding: Rounding | Skip
    nodes: tuple[fx.Node, ...]
    problem: Skip | None
    factor: float
    float_inputs: tuple[fx.Node, ...]


def follow_output(
    normalized: fx.Node, width: object, gain: fx.Node | None, factor: float = 1.0
) -> Tail:
    """Walk through dtype casts and, unless it was met before, one gain to what readers see.

    Args:
        normalized: x / rms times the gain and the factor. Numbers that multiply it belong to the
            norm until they have made up for the factor.
    """
    node, product, at_gain, problem = normalized, normalized, None, None
    before: list[fx.Node] = []
    after: list[fx.Node] = []
    nodes: list[fx.Node] = []
    numbers: list[fx.Node] = []
    inputs: list[fx.Node] = []
    while True:
        users = forward_users(node)
        if len(users) != 1:
            break
        user = users[0]
        if is_dtype_cast(user):
            (before if gain is None else after).append(user)
        elif is_call(user, (aten.alias.default, aten.detach.default)):
            pass
        elif not is_one(factor) and (number := _number(user)) is not None:
            factor, product = factor * number, user
            numbers.append(user)
        elif not is_one(factor) and (found := _factor_inputs(user, node)):
            inputs += found
            product = user
            numbers.append(user)
        elif gain is None and is_call(user, (aten.mul.Tensor,)):
            by = user.args[1] if user.args[0] is node else user.args[0]
            if not is_per_channel(by, width):
                problem = _odd_gain(by, user, node, width)
                break
            gain, at_gain, product = by, node, user  # type: ignore[assignment]
        else:
            break
        nodes.append(user)
        node = user
    rounding = _rounding(normalized, before, at_gain, after, node)
    if numbers:
        rounding = rounding_skip(numbers[0], "no factor but the gain")
    return Tail(
        output=node,
        product=product,
        gain=gain,
        rounding=rounding,
        nodes=tuple(nodes),
        problem=problem,
        factor=factor,
        float_inputs=tuple(inputs),
    )


def is_one(factor: float) -> bool:
    return math.isclose(factor, 1.0, rel_tol=1e-5)


def _factor_inputs(product: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    """The float inputs behind a number that ``node`` is multiplied with or divided by."""
    if not is_call(product, FACTORS):
        return ()
    first, second = product.args[:2]
    if first is not node and product.target in DIVISIONS:
        return ()
    return float_inputs(second if first is node else first)


def _number(product: fx.Node) -> float | None:
    """The number by which the node multiplies something."""
    if is_call(product, (aten.neg.default,)):
        return -1.0
    if not is_call(product, FACTORS):
        return None
    first, second = product.args[:2]
    if product.target in DIVISIONS:
        number = constant_of(second)
        return 1 / number if number else None
    return constant_of(second) if constant_of(first) is None else constant_of(first)


def _odd_gain(factor: object, user: fx.Node, node: fx.Node, width: object) -> Skip | None:
    """A parameter that scales the norm without having one element per channel."""
    if isinstance(factor, fx.Node) and strip(factor, is_view, is_dtype_cast).op != "call_function":
        value, own, result = tensor_of(factor), tensor_of(node), tensor_of(user)
        same = own is not None and result is not None and same_shape(own.shape, result.shape)
        if same and value is not None:
            detail = f"a gain of shape {tuple(value.shape)}, width {width}"
            return Skip(SkipReason.GAIN_SHAPE, detail, user, f"a gain of shape ({width},)")
    return None


def _rounding(
    normalized: fx.Node,
    before: list[fx.Node],
    at_gain: fx.Node | None,
    after: list[fx.Node],
    output: fx.Node,
) -> Rounding | Skip:
    """Which one dtype the casts before the gain round to, and which one those after it."""
    if dtype_of(normalized) != torch.float32:
        return rounding_skip(normalized, "x / rms in f32")
    narrow = [node for node in before if dtype_of(node) != torch.float32]
    norm_dtype = dtype_of(narrow[0]) if narrow else None
    for node in narrow:
        if dtype_of(node) != norm_dtype:
            return rounding_skip(node, f"a single rounding before the gain, to {norm_dtype}")
    for node in after[:-1]:
        if dtype_of(node) != torch.float32:
            return rounding_skip(node, "a single rounding after the gain")
    if at_gain is not None and dtype_of(at_gain) != (norm_dtype or torch.float32):
        return rounding_skip(at_gain, f"a product with the gain in {norm_dtype}")
    # A gain in float32 widens what was rounded before it.
    return Rounding(norm_dtype, dtype_of(output))


def rounding_skip(node: fx.Node, expected: str) -> Skip:
    return Skip(SkipReason.ROUNDING, call_text(node), node, expected)
