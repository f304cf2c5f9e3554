"""Casts to NVFP4, with a scale of the tensor or without: those that are known, and near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand_casts import E4M3_FLOOR, dequantize
from matching import expected_warnings
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.prototype.mx_formats.kernels import (
    f4_unpacked_to_f32,
    f32_to_f4_unpacked,
    pack_uint4,
    unpack_uint4,
)

import mxnorm_pass
from mxnorm_pass import Report, SkipReason
from mxnorm_pass.passes.match.casts.find import Cast, find_casts

pytestmark = expected_warnings

WIDTH, BLOCK = 256, 16
F32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
Quantized = tuple[Tensor, Tensor]


def rows(dtype: torch.dtype = F32) -> Tensor:
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    return (x * torch.logspace(-1, 1, WIDTH)).to(dtype)


def block_scales(blocks: Tensor) -> Tensor:
    return (blocks.abs().amax(-1) / 6.0).clamp(2.0**-6, 448.0).to(E4M3)


def scaled(blocks: Tensor, scales: Tensor) -> Tensor:
    return (blocks * (1.0 / scales.float()).unsqueeze(-1)).clamp(-6, 6).flatten(-2)


def in_blocks(x: Tensor) -> Tensor:
    return x.float().view(*x.shape[:-1], -1, BLOCK)


def packed(x: Tensor) -> Tensor:
    return pack_uint4(f32_to_f4_unpacked(x))


def nvfp4(x: Tensor) -> Quantized:
    blocks = in_blocks(x)
    scales = block_scales(blocks)
    return packed(scaled(blocks, scales)), scales


def second_half_first(x: Tensor) -> Quantized:
    blocks = in_blocks(x)
    scales = block_scales(blocks)
    codes = f32_to_f4_unpacked(scaled(blocks, scales)).view(-1)
    return codes[1::2] | (codes[::2] << 4), scales


def truncated(x: Tensor) -> Quantized:
    blocks = in_blocks(x)
    scales = block_scales(blocks)
    return packed((scaled(blocks, scales) * 2).trunc() / 2), scales


def divided(x: Tensor) -> Quantized:
    blocks = in_blocks(x)
    scales = block_scales(blocks)
    return packed((blocks / scales.float().unsqueeze(-1)).clamp(-6, 6).flatten(-2)), scales


def maximum_of_the_row(x: Tensor) -> Quantized:
    blocks = in_blocks(x)
    largest = blocks.abs().amax(-1).amax(-1, keepdim=True).expand(blocks.shape[:-1])
    scales = (largest / 6.0).clamp(2.0**-6, 448.0).to(E4M3)
    return packed(scaled(blocks, scales)), scales


def maximum_of_two_blocks(x: Tensor) -> Quantized:
    blocks = in_blocks(x)
    scales = block_scales(over_pairs(blocks.abs().amax(-1)).unsqueeze(-1))
    return packed(scaled(blocks, scales)), scales


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nvfp4_is_recognised(dtype: torch.dtype) -> None:
    (found,) = find_casts(make_fx(nvfp4)(rows(dtype)).graph)
    assert isinstance(found, Cast), found
    assert found.format.name == "nvfp4 e2m1 nearest block 16" and found.tensor_scale is None


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "cast",
    [second_half_first, truncated, divided, maximum_of_the_row, maximum_of_two_blocks],
    ids=lambda cast: cast.__name__,
)
def test_near_misses(cast: Callable[[Tensor], Quantized], dtype: torch.dtype) -> None:
    found = find_casts(make_fx(cast)(rows(dtype)).graph)
    assert found and not any(isinstance(f, Cast) for f in found), found


def mxfp8(x: Tensor, of_blocks: Callable[[Tensor], Tensor]) -> Quantized:
    blocks = x.float().view(*x.shape[:-1], -1, 32)
    largest = of_blocks(blocks.abs().amax(-1))
    byte = ((largest.view(torch.int32) >> 23) - 8).clamp_min(0).to(torch.uint8)
    byte = torch.where(largest.isnan(), 255, byte)
    scale = (byte.to(torch.int32) << 23).view(F32).clamp_min(2.0**-126)
    values = (blocks / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(E4M3)
    return values.view(x.shape), byte.view(torch.float8_e8m0fnu)


def over_pairs(largest: Tensor) -> Tensor:
    pairs = largest.view(*largest.shape[:-1], -1, 2).amax(-1, keepdim=True)
    return pairs.expand(*pairs.shape[:-1], 2).reshape(largest.shape)


@pytest.mark.parametrize(
    ("of_blocks", "known"),
    [
        (lambda m: m, True),
        (lambda m: m.amax(-1, keepdim=True).expand(m.shape), False),
        (over_pairs, False),
    ],
    ids=["blocks", "rows", "pairs of blocks"],
)
def test_a_maximum_over_maxima(of_blocks: Callable[[Tensor], Tensor], known: bool) -> None:
    (found,) = find_casts(make_fx(lambda x: mxfp8(x, of_blocks))(rows()).graph)
    assert isinstance(found, Cast) is known, found


def test_scales_along_another_dimension() -> None:
    def cast(x: Tensor) -> Quantized:
        blocks = x.view(32, 32, 32)
        byte = ((blocks.abs().amax(-1).view(torch.int32) >> 23) - 8).clamp_min(0).to(torch.uint8)
        scale = (byte.to(torch.int32) << 23).view(F32).clamp_min(2.0**-126)
        return (blocks / scale).clamp(-448.0, 448.0).to(E4M3), byte.view(torch.float8_e8m0fnu)

    (found,) = find_casts(make_fx(cast)(torch.randn(32, 1024)).graph)
    assert not isinstance(found, Cast)


# The scale of a tensor


def with_tensor_scale(x: Tensor, scale: Tensor) -> Quantized:
    blocks = in_blocks(x)
    scales = (blocks.abs().amax(-1) / 6.0 / scale).clamp(2.0**-6, 448.0).to(E4M3)
    factor = (1.0 / scale) / scales.float()
    return packed((blocks * factor.unsqueeze(-1)).clamp(-6, 6).flatten(-2)), scales


def elements_times_scales(values: Tensor, scales: Tensor) -> Tensor:
    elements = f4_unpacked_to_f32(unpack_uint4(values)).view(*scales.shape, BLOCK)
    return (elements * scales.float().unsqueeze(-1)).flatten(-2)


Outputs = Callable[["Scaled", Tensor, Tensor], Any]


class Scaled(nn.Module):
    """A norm whose output is cast under a scale of its largest element."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.first, self.second = (nn.Linear(WIDTH, 64) for _ in range(2))
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        scale = y.abs().amax() / (448.0 * 6.0)
        return self.outputs(self, elements_times_scales(*with_tensor_scale(y, scale)), scale)


READ_ONCE: dict[str, Outputs] = {
    "scaled": lambda m, a, s: F.linear(a, m.first.weight) * s,
    "half of it": lambda m, a, s: F.linear(a, m.first.weight) * (s * 0.5),
    "bias after": lambda m, a, s: F.linear(a, m.first.weight) * s + m.first.bias,
    "both": lambda m, a, s: (F.linear(a, m.first.weight) * s, F.linear(a, m.second.weight) * s),
}
OTHERWISE: dict[str, Outputs] = {
    "not scaled": lambda m, a, s: F.linear(a, m.first.weight),
    "one of two": lambda m, a, s: (F.linear(a, m.first.weight) * s, F.linear(a, m.second.weight)),
    "squared": lambda m, a, s: F.linear(a, m.first.weight) * (s * s),
    "twice": lambda m, a, s: F.linear(a, m.first.weight) * s * s,
    "bias scaled": lambda m, a, s: F.linear(a, m.first.weight, m.first.bias) * s,
    "returned": lambda m, a, s: (F.linear(a, m.first.weight) * s, s),
    "unscaled, too": lambda m, a, s: (y := F.linear(a, m.first.weight), y * s),
    "times itself": lambda m, a, s: (a @ a.t()) * s,
}


class BothScales(Scaled):
    """Blocks' scales are multiplied by the tensor's before they multiply the elements."""

    times = 1

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        scale = y.abs().amax() / (448.0 * 6.0)
        values, scales = with_tensor_scale(y, scale)
        both = scales.float()
        for _ in range(self.times):
            both = both * scale
        return self.first(elements_times_scales(values, both))


class ScaledTwice(BothScales):
    times = 2


def run(outputs: Outputs, **options: Any) -> tuple[Report, Any, Any]:
    return run_model(Scaled(outputs), **options)


def run_model(model: nn.Module, **options: Any) -> tuple[Report, Any, Any]:
    torch._dynamo.reset()
    x = rows()
    options = {"inner": "aot_eager", "quantize": "existing", **options}
    with torch.no_grad(), mxnorm_pass.record() as report:
        want = model(x)
        got = torch.compile(model, backend="mxnorm", options=options)(x)
    if isinstance(want, tuple):
        return report, got, want
    return report, (got,), (want,)


@pytest.mark.parametrize("outputs", READ_ONCE.values(), ids=list(READ_ONCE))
@pytest.mark.parametrize("tensor_scale", ["bound", "amax"])
def test_a_scale_that_may_be_another(outputs: Outputs, tensor_scale: str) -> None:
    report, got, want = run(outputs, tensor_scale=tensor_scale)
    assert [site.status for site in report.sites] == ["fused"], str(report)
    for a, b in zip(got, want, strict=True):
        # Of the estimate and of 4 bits.
        assert (a - b).norm() <= 0.3 * b.norm()


@pytest.mark.parametrize("outputs", OTHERWISE.values(), ids=list(OTHERWISE))
def test_a_scale_that_another_would_change_the_result_of(outputs: Outputs) -> None:
    report, got, want = run(outputs)
    assert [site.reason for site in report.sites] == [SkipReason.CAST_ESCAPES], str(report)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_each_compiler_spells_it_in_a_known_way(inner: str) -> None:
    """Inductor takes stacks of half bytes apart."""
    report, (got,), (want,) = run(READ_ONCE["scaled"], inner=inner, estimator="exact")
    assert [site.status for site in report.sites] == ["fused"], str(report)
    # Each element may round to its neighbour.
    assert (got - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("outputs", [*READ_ONCE.values(), *OTHERWISE.values()])
def test_exact_keeps_the_scale_and_all_bits(outputs: Outputs) -> None:
    report, got, want = run(outputs, estimator="exact")
    assert [site.status for site in report.sites] == ["fused"], str(report)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


ESCAPES = SkipReason.CAST_ESCAPES


@pytest.mark.parametrize(
    ("model", "estimator", "reason"),
    [
        (BothScales, "exact", None),
        (BothScales, "mxnorm", ESCAPES),
        (ScaledTwice, "exact", ESCAPES),
        (ScaledTwice, "mxnorm", ESCAPES),
    ],
)
def test_dequantisation_with_both_scales(
    model: type[BothScales], estimator: str, reason: SkipReason | None
) -> None:
    """Of an estimate the tensor's scale is another, which so far no such product is given."""
    torch.manual_seed(0)
    report, got, want = run_model(model(lambda *_: None), estimator=estimator)
    assert [site.reason for site in report.sites] == [reason], str(report)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_another_linear_that_is_off_reads_the_cast() -> None:
    """Its product would be scaled by what the fused cast has."""
    report, got, want = run(READ_ONCE["both"], modules={"second*": False})
    assert [site.reason for site in report.sites] == [ESCAPES], str(report)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Unscaled(torch.autograd.Function):
    """Times the scale, of which the gradient knows nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class BackwardReads(Scaled):
    """The weight's gradient is a product with what was cast, without the tensor's scale."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.norm(x)
            scale = y.abs().amax() / (448.0 * 6.0)
            cast = elements_times_scales(*with_tensor_scale(y, scale))
        return Unscaled.apply(F.linear(cast, self.first.weight), scale)


def test_a_backward_without_the_scale() -> None:
    model = BackwardReads(READ_ONCE["scaled"])
    gradients = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mxnorm", options={"inner": "aot_eager"})
    with mxnorm_pass.record() as report:
        for run_it in (model, compiled):
            model.zero_grad()
            run_it(rows()).square().sum().backward()
            gradients.append(model.first.weight.grad)
    assert [site.reason for site in report.sites] == [ESCAPES], str(report)
    assert torch.equal(*gradients)


# Scales that were chosen with the gain, or beside the weight


class SmallGain(Scaled):
    """The scale is that of rows with their gain, which makes them small."""

    def __init__(self) -> None:
        super().__init__(READ_ONCE["scaled"])
        nn.init.constant_(self.norm.weight, 0.01)
        self.register_buffer("largest", torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.norm(x), self.largest / (448.0 * 6.0)
        weight = dequantize(*E4M3_FLOOR(self.first.weight))
        return F.linear(elements_times_scales(*with_tensor_scale(y, scale)), weight) * scale


class NoWeightScale(Scaled):
    """With the gain in it, the weight would be too small for scales in e4m3."""

    def __init__(self) -> None:
        super().__init__(READ_ONCE["scaled"])
        nn.init.constant_(self.norm.weight, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scale = y.abs().amax() / (448.0 * 6.0)
        weight = elements_times_scales(*nvfp4(self.first.weight))
        return F.linear(elements_times_scales(*with_tensor_scale(y, scale)), weight) * scale


class WeightScaleTwice(Scaled):
    """What scales the result is computed anew, and not what the weight was cast with."""

    def __init__(self) -> None:
        super().__init__(READ_ONCE["scaled"])
        nn.init.uniform_(self.norm.weight, 0.1, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        scales = [weight.abs().amax() / (448.0 * 6.0) for _ in range(2)]
        cast = elements_times_scales(*with_tensor_scale(weight, scales[0]))
        return F.linear(elements_times_scales(*nvfp4(self.norm(x))), cast) * scales[1]


@pytest.mark.parametrize("model", [SmallGain, NoWeightScale, WeightScaleTwice])
def test_the_gain_is_not_folded(model: Callable[[], Scaled]) -> None:
    report, (got,), (want,) = run_model(model())
    assert [site.gain for site in report.sites] == ["activation"], str(report)
    assert (got - want).norm() <= 0.3 * want.norm()
    report, *_ = run_model(model(), gain="fold")
    assert [site.reason for site in report.sites] == [SkipReason.NO_WEIGHT_CAST], str(report)


class HighPrecisionBackward(torch.autograd.Function):
    """A product of casts, whose gradients are those of the product of what is cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        cast = dequantize(*E4M3_FLOOR(weight))
        return elements_times_scales(*with_tensor_scale(x, scale)) @ cast.t() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, None


class ComputedLate(SmallGain):
    """The scale is computed behind the norm's statistic."""

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.norm(x), self.largest / (448.0 * 6.0)
        return HighPrecisionBackward.apply(y, self.first.weight, scale)


class OfTheExactNorm(SmallGain):
    """The scale reads the norm beside the Function that casts it, and stays exact."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scale = y.abs().amax() / (448.0 * 6.0)
        return HighPrecisionBackward.apply(y, self.first.weight, scale)


@pytest.mark.parametrize(
    ("kind", "gain"), [(ComputedLate, "auto"), (OfTheExactNorm, "auto"), (OfTheExactNorm, "fold")]
)
def test_scales_in_training(kind: type[SmallGain], gain: str) -> None:
    model, results = kind(), []
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "gain": gain}
    compiled = torch.compile(model, backend="mxnorm", options=options)
    with mxnorm_pass.record() as report:
        for run_it in (model, compiled):
            model.zero_grad()
            y = run_it(rows())
            y.square().sum().backward()
            results.append((y, model.first.weight.grad, model.norm.weight.grad))
    assert [site.status for site in report.sites] == ["fused"], str(report)
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= 0.3 * want.norm()


def test_packed_bytes_without_a_norm() -> None:
    def function(x: Tensor) -> Tensor:
        scale = (x.abs().amax() / 6).reshape(1, 1)
        codes = (x.view(-1, 16) / scale).round().clamp(0, 7).to(torch.uint8).view(x.shape)
        return codes[..., ::2] | (codes[..., 1::2] << 4)

    x = rows()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="mxnorm", options={"inner": "aot_eager"})
    assert torch.equal(compiled(x), function(x))
