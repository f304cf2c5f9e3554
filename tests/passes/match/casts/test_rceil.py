"""RCEIL casts: exact spellings, those by float32's log2, and near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hand_casts import HAND_CASTS, Cast, HandCast, hand_cast_model, rceil_by_bits, to_byte
from matching import BF16, F32, WIDTH, assert_same_bits, only_site, run, uncompiled
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

from mxnorm_pass import functional
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES, BlockFormat
from mxnorm_pass.passes.match.casts.find import Cast as FoundCast
from mxnorm_pass.passes.match.casts.find import UnknownCast, find_casts

F16 = torch.float16
all_inputs = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
all_elements = pytest.mark.parametrize("elem", ELEMENT_DTYPES, ids=str)


def found(cast: Cast, dtype: torch.dtype) -> BlockFormat | str:
    """What the pass takes the cast for; words where it is none."""
    (match,) = find_casts(make_fx(cast, tracing_mode="fake")(torch.ones(4, 64, dtype=dtype)).graph)
    if isinstance(match, UnknownCast):
        return match.skip.detail
    assert isinstance(match, FoundCast)
    return match.format


def by_log2(absmax: Tensor) -> Tensor:
    return to_byte(torch.log2(absmax / 448.0).ceil(), absmax, infinite=254)


def by_log2_in_float64(absmax: Tensor) -> Tensor:
    return to_byte(torch.log2(absmax.double() / 448.0).ceil(), absmax, infinite=254)


def rounded_up(descale: Tensor) -> Tensor:
    """As PTX's cvt.rp; 2^-127, the smallest scale, is 1 << 22."""
    bits = descale.view(torch.int32)
    byte = torch.where(bits > 1 << 22, (bits + 0x7FFFFF) >> 23, 0)
    return to_byte(byte.float() - 127, descale, infinite=254)


def of_the_quotient(absmax: Tensor) -> Tensor:
    return rounded_up(absmax / 448.0)


def of_the_product(absmax: Tensor) -> Tensor:
    """Float32's 1 / 448 is too large by 3/8 of 2^-23, which no power of two notices."""
    return rounded_up(absmax * (1.0 / 448.0))


EXACT = (rceil_by_bits, by_log2_in_float64, of_the_quotient, of_the_product)


@all_inputs
@pytest.mark.parametrize("exponent", [by_log2, *EXACT])
def test_log2_tells_in_float32_only(
    exponent: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    mode = "rceil-log2" if exponent is by_log2 and dtype == F32 else "rceil"
    assert found(HandCast(exponent, reciprocal=True), dtype) == BlockFormat.of(scale_mode=mode)


def one_ulp_early(absmax: Tensor) -> Tensor:
    """448 itself moves to the next scale."""
    return to_byte(((absmax.view(torch.int32) + 0x200000) >> 23).float() - 135, absmax, 254)


def one_ulp_late(absmax: Tensor) -> Tensor:
    """The float32 above 448 does not move: as log2 has it for large exponents, but for all."""
    return to_byte(((absmax.view(torch.int32) + 0x1FFFFE) >> 23).float() - 135, absmax, 254)


def of_a_large_product(absmax: Tensor) -> Tensor:
    return rounded_up(absmax * torch.tensor(1.0 / 448.0).nextafter(torch.tensor(1.0)).item())


@pytest.mark.parametrize("exponent", [one_ulp_early, one_ulp_late, of_a_large_product])
def test_near_misses(exponent: Callable[[Tensor], Tensor]) -> None:
    assert "matches no MX scale mode" in str(found(HandCast(exponent, reciprocal=True), F32))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@all_elements
def test_torchaos_rceil(elem: torch.dtype, dtype: torch.dtype) -> None:
    def cast(x: Tensor) -> tuple[Tensor, Tensor]:
        scales, values = to_mx(x, elem, 32, ScaleCalculationMode.RCEIL)
        return values, scales

    mode = "rceil-log2" if dtype == F32 else "rceil"
    assert found(cast, dtype) == BlockFormat.of(elem, mode)


def test_exact_keeps_the_bits_of_log2() -> None:
    """Rows of ones, whose RMS is 1 to the bit: the casts see a gain that tells the modes apart."""
    cast, mode = HAND_CASTS["rceil by floor"]
    model, x = hand_cast_model(cast), torch.ones(3, WIDTH)
    model.norm.eps = 1e-30
    peak = torch.tensor(448.0 * 2.0**32).nextafter(torch.tensor(torch.inf))
    with torch.no_grad():
        model.norm.weight.copy_(peak * 2.0 ** -(torch.arange(WIDTH) % 32 / 2))
    got, report = run(model, x, quantize="existing", estimator="exact")
    site = only_site(report)
    assert (site.status, site.format) == ("fused", "mxfp8 e4m3fn rceil-log2 block 32"), str(site)
    want = uncompiled(model, x)
    assert_same_bits(got, want)
    y, weight = model.norm(x).detach(), model.second.weight
    log2, rceil = (
        functional.mx_linear(y, weight, format=BlockFormat.of(scale_mode=m))
        for m in (mode, "rceil")
    )
    assert torch.equal(log2, want[1]) and not torch.equal(rceil, want[1])
