"""MX casts written by hand, and models that use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from formats import in_a_format
from matching import EPS, Model
from torch import Tensor, nn

from mxnorm_pass import functional

Cast = Callable[[Tensor], tuple[Tensor, Tensor]]
INFINITE = 247  # the byte that the modes by exponent give to an infinite block


@dataclass(frozen=True)
class HandCast:
    """An MX cast in plain torch ops: blocks, an exponent per block, elements.

    Attributes:
        exponent: absmax [..., K, 1] -> biased exponents, uint8.
        limit: where elements are clamped.
        reciprocal: multiply by 1 / scale as RCEIL does, instead of dividing.
    """

    exponent: Callable[[Tensor], Tensor]
    limit: float = 448.0
    block_size: int = 32
    reciprocal: bool = False
    elem_dtype: torch.dtype = torch.float8_e4m3fn

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self.blocks(x)
        byte = self.exponent(blocks.abs().amax(-1, keepdim=True))
        values = self.elements(blocks, byte).view(x.shape)
        return values, byte.squeeze(-1).view(torch.float8_e8m0fnu)

    def blocks(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], -1, self.block_size).float()

    def elements(self, blocks: Tensor, byte: Tensor) -> Tensor:
        if self.reciprocal:
            factor = torch.exp2(127.0 - byte.float())
            factor = torch.where(byte == 0, 1.0, factor)
            scaled = blocks * torch.where(byte == 255, torch.nan, factor)
        else:
            scale = (byte.to(torch.int32) << 23).view(torch.float32)
            scaled = blocks / scale.clamp_min(2.0**-126)
        return scaled.clamp(-self.limit, self.limit).to(self.elem_dtype)


def to_byte(exponent: Tensor, absmax: Tensor, infinite: int = INFINITE) -> Tensor:
    """The special values of E8M0; ``exponent`` is a float."""
    byte = (exponent.clamp(-127, 127) + 127).to(torch.uint8)
    byte = torch.where(absmax == torch.inf, infinite, byte)
    return torch.where(absmax != absmax, 255, byte)


def floor_log2(absmax: Tensor) -> Tensor:
    """In float64, where the log2 of no float32 below a power of two rounds up to it."""
    return torch.log2(absmax.double()).floor()


def floor_by_log2(absmax: Tensor) -> Tensor:
    return to_byte(floor_log2(absmax) - 8, absmax)


def ceil_by_log2(absmax: Tensor) -> Tensor:
    return to_byte(torch.log2(absmax.double()).ceil() - 8, absmax)


def even_by_comparison(absmax: Tensor) -> Tensor:
    """Three mantissa bits round 1.9375 and more up to 2."""
    low = floor_log2(absmax)
    up = absmax.double() >= 1.9375 * torch.exp2(low)
    return to_byte(low + up.double() - 8, absmax)


def rceil_by_floor(absmax: Tensor) -> Tensor:
    descale = absmax / 448.0
    return to_byte(-torch.floor(-torch.log2(descale)), absmax, infinite=254)


def rceil_by_bits(absmax: Tensor) -> Tensor:
    """0x1FFFFF carries from all mantissas above that of 448 = 1.75 * 2^8."""
    exponent = (absmax.view(torch.int32) + 0x1FFFFF) >> 23
    return to_byte((exponent - 8).float() - 127, absmax, infinite=254)


def floor_by_bits(absmax: Tensor) -> Tensor:
    exponent = (absmax.view(torch.int32) >> 23).bitwise_and(255)
    return torch.where(absmax.isnan(), 255, (exponent - 8).clamp_min(0).to(torch.uint8))


def ceil_by_bits(absmax: Tensor) -> Tensor:
    exponent = (absmax.view(torch.int32) + 0x7FFFFF) >> 23
    return torch.where(absmax.isnan(), 255, (exponent - 8).clamp_min(0).to(torch.uint8))


def even_by_bits(absmax: Tensor) -> Tensor:
    exponent = (absmax.view(torch.int32) + (1 << 19)) >> 23
    return torch.where(absmax.isnan(), 255, (exponent - 8).clamp_min(0).to(torch.uint8))


HAND_CASTS = {
    "floor by log2": (HandCast(floor_by_log2), "floor"),
    "ceil by log2": (HandCast(ceil_by_log2), "ceil"),
    "even by comparison": (HandCast(even_by_comparison), "even"),
    "rceil by floor": (HandCast(rceil_by_floor, reciprocal=True), "rceil-log2"),
    "rceil by bits": (HandCast(rceil_by_bits, reciprocal=True), "rceil"),
    "floor by bits": (HandCast(floor_by_bits), "floor"),
    "ceil by bits": (HandCast(ceil_by_bits), "ceil"),
    "even by bits": (HandCast(even_by_bits), "even"),
}
E4M3_FLOOR = HandCast(floor_by_bits)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    exponent = scales.view(torch.uint8).to(torch.float32) - 127
    blocks = values.to(torch.float32).view(*scales.shape, -1)
    return (blocks * torch.exp2(exponent).unsqueeze(-1)).view(values.shape)


class CastLinear(nn.Module):
    """A linear on two casts; its backward is that of the dequantised operands."""

    def __init__(self, linear: nn.Linear, cast: Cast) -> None:
        super().__init__()
        self.weight, self.bias, self.cast = linear.weight, linear.bias, cast

    def activation(self, x: Tensor) -> Tensor:
        return dequantize(*self.cast(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(x), dequantize(*self.cast(self.weight)), self.bias)


def hand_cast_model(cast: Cast, kind: type[CastLinear] = CastLinear) -> Model:
    model = Model()
    model.first, model.second = kind(model.first, cast), kind(model.second, cast)
    return model


def hand_cast_reference(
    model: Model, x: Tensor, mode: str, block_size: int = 32, elem: torch.dtype | None = None
) -> list[Tensor]:
    form = {"scale_mode": mode, "block_size": block_size}
    form |= {"elem_dtype": elem} if elem is not None else {}
    form = in_a_format(form)
    gain = model.norm.weight
    with torch.no_grad():
        quantized = functional.mxnorm_cast(x, eps=EPS, **form)[:2]
        y = functional.mxnorm(x, gain, eps=EPS)
        return [
            functional.mx_linear(y, m.weight, m.bias, quantized=quantized, gain=gain, **form)
            for m in (model.first, model.second)
        ]


# Near misses: other readers of the cast


class ReadsMore(Model):
    """Returns something of the activation's cast besides the linear's output."""

    def __init__(self, more: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, scales, more = self.more(self.norm(x))
        weight = dequantize(*E4M3_FLOOR(self.second.weight))
        return F.linear(dequantize(values, scales), weight), more


def reads_values(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, scales = E4M3_FLOOR(y)
    return values, scales, values.float().sum(-1)
