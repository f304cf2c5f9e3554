"""MX casts written by hand: those that are recognised, and near misses that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hand_casts import (
    E4M3_FLOOR,
    HAND_CASTS,
    CastLinear,
    HandCast,
    ReadsMore,
    dequantize,
    floor_by_bits,
    hand_cast_model,
    hand_cast_reference,
    rceil_by_floor,
    reads_values,
    to_byte,
)
from matching import (
    CONSUMERS,
    EPS,
    WIDTH,
    Model,
    assert_close,
    assert_same_bits,
    assert_skipped,
    assert_untouched,
    expected_warnings,
    gradients,
    inputs,
    only_site,
    run,
    uncompiled,
)
from pairwise import each_value
from torch import Tensor, nn

from mxnorm_pass import SkipReason, functional

pytestmark = expected_warnings


@pytest.mark.parametrize("cast, mode", list(HAND_CASTS.values()), ids=list(HAND_CASTS))
def test_hand_written_cast_is_recognised(cast: HandCast, mode: str) -> None:
    model, x = hand_cast_model(cast), inputs(scale=1.0)
    got, report = run(model, x, quantize="existing")
    site = only_site(report)
    assert (site.status, site.consumers) == ("fused", CONSUMERS), str(site)
    # The estimate's scales are exact.
    fused_mode = mode.removesuffix("-log2")
    assert (site.gain, site.format) == ("fold", f"mxfp8 e4m3fn {fused_mode} block 32")
    assert_same_bits(got, hand_cast_reference(model, x, fused_mode))


def test_block_size_is_read() -> None:
    outputs = []
    for block_size in (16, 32):
        cast = HandCast(floor_by_bits, block_size=block_size)
        model, x = hand_cast_model(cast), inputs(scale=1.0)
        got, report = run(model, x, quantize="existing")
        site = only_site(report)
        assert (site.status, site.format) == ("fused", f"mxfp8 e4m3fn floor block {block_size}")
        assert_same_bits(got, hand_cast_reference(model, x, "floor", block_size))
        outputs.append(got[0])
    assert not torch.equal(*outputs)


def test_element_type_is_read() -> None:
    e5m2 = torch.float8_e5m2

    def floor(absmax: Tensor) -> Tensor:
        exponent = (absmax.view(torch.int32) >> 23).bitwise_and(255)
        return torch.where(absmax.isnan(), 255, (exponent - 15).clamp_min(0).to(torch.uint8))

    model = hand_cast_model(HandCast(floor, limit=57344.0, elem_dtype=e5m2))
    x = inputs(scale=1.0)
    got, report = run(model, x, quantize="existing")
    site = only_site(report)
    assert (site.status, site.format) == ("fused", "mxfp8 e5m2 floor block 32"), str(site)
    assert_same_bits(got, hand_cast_reference(model, x, "floor", elem=e5m2))


# Near misses: the cast


def off_by_one(absmax: Tensor) -> Tensor:
    exponent = (absmax.view(torch.int32) >> 23).bitwise_and(255)
    return torch.where(absmax.isnan(), 255, (exponent - 7).clamp_min(0).to(torch.uint8))


def floor_of_float32_log2(absmax: Tensor) -> Tensor:
    """Float32's log2 of the last number below a power of two may round up to it."""
    return to_byte(torch.log2(absmax).floor() - 8, absmax)


@dataclass(frozen=True)
class ByteScale(HandCast):
    """The scales stay bytes and are never called E8M0."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = super().__call__(x)
        return values, scales.view(torch.uint8)


class BareByteScale(HandCast):
    """As :class:`ByteScale`, with no bitcast in the graph at all."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self.blocks(x)
        byte = self.exponent(blocks.abs().amax(-1, keepdim=True))
        return self.elements(blocks, byte).view(x.shape), byte.squeeze(-1)


@each_value(kind=[ByteScale, BareByteScale], gain=["fold", "activation"])
def test_scales_that_are_read_as_bytes(kind: type[HandCast], gain: str) -> None:
    model, x = hand_cast_model(kind(floor_by_bits)), inputs(scale=1.0)
    same = hand_cast_model(HandCast(floor_by_bits))
    got, report = run(model, x, quantize="existing", gain=gain)
    site = only_site(report)
    assert (site.status, site.gain) == ("fused", gain), str(site)
    assert site.format == "mxfp8 e4m3fn floor block 32"
    assert_same_bits(got, run(same, x, quantize="existing", gain=gain)[0])


class Float32Scale(HandCast):
    """The scale of a block is a float32 power of two, not a byte."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self.blocks(x)
        absmax = blocks.abs().amax(-1, keepdim=True)
        scale = torch.exp2(torch.floor(torch.log2(absmax)) - 8)
        values = (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return values.view(x.shape), scale.squeeze(-1)


class Float32ScaleLinear(CastLinear):
    def activation(self, x: Tensor) -> Tensor:
        values, scales = self.cast(x)
        blocks = values.float().view(*scales.shape, -1)
        return (blocks * scales.unsqueeze(-1)).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(x), self.activation(self.weight), self.bias)


@pytest.mark.parametrize(
    "cast, kind, detail",
    [
        (HandCast(off_by_one), CastLinear, "no MX scale mode"),
        (HandCast(floor_by_bits, limit=240.0), CastLinear, "no MX scale mode"),
        (HandCast(floor_of_float32_log2), CastLinear, "no MX scale mode"),
        (HandCast(rceil_by_floor), CastLinear, "no MX scale mode"),
        (Float32Scale(floor_by_bits), Float32ScaleLinear, "no scale of one byte"),
    ],
    ids=["off by one", "clamp at 240", "log2 in fp32", "rceil divided", "float32 scale"],
)
def test_cast_that_is_no_mx_cast(cast: HandCast, kind: type[CastLinear], detail: str) -> None:
    model, x = hand_cast_model(cast, kind), inputs(scale=1.0)
    got, report = run(model, x)
    assert detail in assert_skipped(report, SkipReason.CAST_NOT_RECOGNIZED).detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def reads_scales(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, scales = E4M3_FLOOR(y)
    return values, scales, scales.view(torch.uint8).float().sum(-1)


def returns_values(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, scales = E4M3_FLOOR(y)
    return values, scales, values.float()


@pytest.mark.parametrize(
    "more, node", [(reads_values, "sum"), (reads_scales, "sum"), (returns_values, "output")]
)
def test_cast_that_escapes(
    more: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], node: str
) -> None:
    model, x = ReadsMore(more), inputs(scale=1.0)
    got, report = run(model, x, quantize="existing")
    assert node in assert_skipped(report, SkipReason.CAST_ESCAPES).detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def reads_absmax(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = E4M3_FLOOR.blocks(y)
    absmax = blocks.abs().amax(-1, keepdim=True)
    byte = E4M3_FLOOR.exponent(absmax)
    values = E4M3_FLOOR.elements(blocks, byte).view(y.shape)
    return values, byte.squeeze(-1).view(torch.float8_e8m0fnu), absmax.sum()


def reads_clamped(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = E4M3_FLOOR.blocks(y)
    byte = E4M3_FLOOR.exponent(blocks.abs().amax(-1, keepdim=True))
    scale = (byte.to(torch.int32) << 23).view(torch.float32).clamp_min(2.0**-126)
    clamped = (blocks / scale).clamp(-448.0, 448.0)
    values = clamped.to(torch.float8_e4m3fn).view(y.shape)
    return values, byte.squeeze(-1).view(torch.float8_e8m0fnu), clamped


@pytest.mark.parametrize("more, node", [(reads_absmax, "amax"), (reads_clamped, "clamp")])
def test_inside_of_a_cast_is_read(
    more: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], node: str
) -> None:
    model, x = ReadsMore(more), inputs(scale=1.0)
    got, report = run(model, x, quantize="existing")
    site = assert_skipped(report, SkipReason.CAST_NOT_RECOGNIZED)
    assert f"{node} inside the cast is read from outside" in site.detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


# Between dequantisation and matmul


class Between(CastLinear):
    """Something happens between dequantisation and matmul."""

    between: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        activation = type(self).between(self.activation(x), x)
        return F.linear(activation, dequantize(*self.cast(self.weight)), self.bias)


class ReluBetween(Between):
    between = staticmethod(lambda q, x: torch.relu(q))


class AddBetween(Between):
    between = staticmethod(lambda q, x: q + torch.sigmoid(x))


class ExponentialBetween(Between):
    between = staticmethod(lambda q, x: torch.exp(q))


@pytest.mark.parametrize(
    "kind, node", [(ReluBetween, "relu"), (AddBetween, "add"), (ExponentialBetween, "exp")]
)
def test_ops_between_dequantisation_and_matmul(kind: type[Between], node: str) -> None:
    """No gain can be folded across them."""
    model, x = hand_cast_model(E4M3_FLOOR, kind), inputs(scale=1.0)
    with torch.no_grad():
        model.norm.weight.neg_()
    got, report = run(model, x, quantize="existing")
    assert node in assert_skipped(report, SkipReason.CAST_ESCAPES).detail
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


class StraightThrough(CastLinear):
    """Fake quantisation as quantisation-aware training writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.through(x), self.through(self.weight), self.bias)

    def through(self, x: Tensor) -> Tensor:
        return x + (dequantize(*self.cast(x.detach())) - x).detach()


def test_straight_through_estimator() -> None:
    """Its backward reads operands that a fold would change."""
    model = hand_cast_model(E4M3_FLOOR, StraightThrough)
    x = inputs(scale=1.0).requires_grad_()
    got, report = run(model, x, train=True, quantize="existing")
    want = model(x)
    assert_skipped(report, SkipReason.CAST_ESCAPES)
    assert_same_bits(got, want)
    leaves = [model.first.weight, model.second.weight]
    # Casts and estimate move an activation by some 7 %; a lost gain in [0.5, 1.5] by 28 %.
    assert_close(gradients(got, leaves), gradients(want, leaves), CONSUMERS, 0.15)


class OverTokens(Model):
    """The weight's rows are tokens: the matmul contracts them, not the channels."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = dequantize(*E4M3_FLOOR(self.norm(x)))
        return (y.t() @ dequantize(*E4M3_FLOOR(self.square)),)


def test_matmul_over_tokens() -> None:
    """The gain goes to the activation: the other operand has no channels to fold it into."""
    model, x = OverTokens(), inputs(WIDTH, WIDTH, scale=1.0)
    model.square = nn.Parameter(inputs(WIDTH, WIDTH, scale=1.0, seed=5))
    got, report = run(model, x, quantize="existing")
    site = only_site(report)
    assert (site.status, site.gain) == ("fused", "activation"), str(site)
    with torch.no_grad():
        form = {"eps": EPS, "format": "mxfp8 e4m3fn floor block 32"}
        quantized = functional.mxnorm_cast(x, model.norm.weight, **form)[:2]
        want = [dequantize(*quantized).t() @ dequantize(*E4M3_FLOOR(model.square))]
    assert_same_bits(got, want)
