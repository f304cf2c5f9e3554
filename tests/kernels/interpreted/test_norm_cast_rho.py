"""The row kernel's inverse RMS against float64, and its results against ``functional``'s own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_rows import BF16, E4M3, E5M2, F32, kernel, reference, spec
from numerics import U, gain, normal
from pairwise import each_value
from torch import Tensor

from mxnorm_pass.kernels.rows import RowTiling
from mxnorm_pass.numerics.e8m0 import e8m0_to_float
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.rms import rms_constant

# Error of the hardware's base-2 logarithm and exponential (PTX ISA, lg2.approx and ex2.approx);
# the interpreter's are better.
APPROX = 2.0**-22

ESTIMATORS: dict[str, dict[str, Any]] = {
    "p=2": {},
    "p=1": {"p": 1.0},
    "p=0.5": {"p": 0.5},
    "p=1.5": {"p": 1.5},
    "p=3": {"p": 3.0},
    "p=16": {"p": 16.0},
    "exact": {"estimator": "exact"},
}
all_configs = pytest.mark.parametrize(
    "config", [RowTiling(8, 1, 4), RowTiling(4, 4, 4)], ids=["whole_rows", "chunks"]
)


def absmax64(x: Tensor, block_size: int) -> Tensor:
    return x.double().unflatten(-1, (-1, block_size)).abs().amax(-1)


def rho64(x: Tensor, options: NormCastSpec, block_weights: Tensor | None) -> Tensor:
    if options.estimator == "exact":
        square = x.double().square().mean(-1, keepdim=True)
    else:
        m, p = absmax64(x, options.format.block_size), options.p
        c = rms_constant(p, options.format.block_size)
        each = 1 / (m.shape[-1] * c**p) if block_weights is None else block_weights.double()
        square = (m.pow(p) * each).sum(-1, keepdim=True).pow(2 / p)
    return 1 / torch.sqrt(square + options.eps)


def power_error(exponent: float, log2: float) -> float:
    """Relative error of 2^(exponent log2(x)) where |log2 x| <= ``log2``.

    The logarithm is off by ``APPROX``, of 1 near x = 1 and of itself elsewhere; the exponent's own
    rounding and the product's are relative to the product; then the exponential's.
    """
    absolute = exponent * (APPROX * max(1.0, log2) + 2 * U * log2)
    return math.log(2) * absolute + APPROX


def rho_error(x: Tensor, options: NormCastSpec, block_weights: Tensor | None) -> float:
    """Bound on rho's relative error.

    A sum of n non-negative terms, in any order and restarted for every chunk, is off by at most
    n U. Terms, weights and factors are rounded before they are multiplied, each product once more.
    The root halves what was wrong below it; eps adds 2 U there, and the root and the division U
    each. The hardware divides m by the largest one within 2 ulp, which is 4 U.
    """
    blocks, p = x.shape[-1] // options.format.block_size, options.p
    if options.estimator == "exact":
        return ((1 + x.shape[-1] + 2) + 2) * U / 2 + 2 * U
    weighting = 1 if block_weights is not None else 0
    if p == 2:
        return ((1 + weighting + blocks + 2) + 2) * U / 2 + 2 * U
    if p == 1:
        return ((weighting + blocks + 2) * 2 + 1 + 2) * U / 2 + 2 * U
    m, each = absmax64(x, options.format.block_size), 4 * U
    if block_weights is not None:
        weights = block_weights[block_weights > 0].double()
        m = m[..., block_weights > 0] * weights.pow(1 / p)
        each += power_error(1 / p, float(weights.log2().abs().max())) + U
    ratio = m / m.amax(-1, keepdim=True)
    mean = ratio.pow(p).sum(-1) if weighting else ratio.pow(p).mean(-1)
    # A chunk's terms are scaled once more for each chunk that follows: at most three times.
    term = 4 * (p * each + power_error(p, -math.log2(ratio.min())) + U)
    total = term + (blocks + 2) * U
    root = total / p + power_error(1 / p, float(mean.log2().abs().max())) + 3 * U
    return root + (1 + 2) * U / 2 + 2 * U


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual.double() - expected) / expected).abs().max())


@each_value(
    width=[32, 96, 544, 1024],
    config={"whole_rows": RowTiling(8, 1, 4), "chunks": RowTiling(4, 4, 4)},
    estimator=ESTIMATORS,
)
def test_rho(estimator: dict[str, Any], config: RowTiling, width: int) -> None:
    chunks = min(config.chunks, 2 ** math.floor(math.log2(width // 32)))
    config = RowTiling(config.rows, chunks, config.warps)
    for dtype, magnitude in ((BF16, 1.0), (F32, 1e-3), (F32, 1e3)):
        x, options = (magnitude * normal(8, width)).to(dtype), spec(**estimator)
        rho = kernel(x, None, options, config=config).rho
        assert relative(rho, rho64(x, options, None)) <= rho_error(x, options, None)


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5, 1.5, 3.0])
@all_configs
def test_rho_with_block_weights(p: float, config: RowTiling) -> None:
    x, options = normal(8, 544, dtype=BF16), spec(p=p)
    block_weights = gain(17, F32, 0.0, 0.1)
    block_weights[::5] = 0.0
    rho = kernel(x, None, options, block_weights=block_weights, config=config).rho
    expected = rho64(x, options, block_weights)
    assert relative(rho, expected) <= rho_error(x, options, block_weights)


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 16.0])
@all_configs
def test_a_huge_block_without_weight_does_not_count(p: float, config: RowTiling) -> None:
    x, options = normal(8, 128), spec(p=p)
    x[:, 64:96] *= 1e4
    block_weights = gain(4, F32, 0.05, 0.1)
    block_weights[2] = 0.0
    rho = kernel(x, None, options, block_weights=block_weights, config=config).rho
    expected = rho64(x, options, block_weights)
    assert relative(rho, expected) <= rho_error(x, options, block_weights)


@pytest.mark.parametrize("p", [2.0, 1.0, 1.5])
def test_block_weights_of_the_gaussian_change_nothing(p: float) -> None:
    x, options = normal(8, 256, dtype=BF16), spec(p=p)
    gaussian = torch.full((8,), 1 / (8 * rms_constant(p, 32) ** p))
    weighted = kernel(x, None, options, block_weights=gaussian).rho
    bound = rho_error(x, options, gaussian) + rho_error(x, options, None)
    assert relative(weighted, kernel(x, None, options).rho.double()) <= bound


@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
@pytest.mark.parametrize("p", [0.5, 1.5, 3.0])
def test_huge_and_tiny_rows(estimator: Any, p: float) -> None:
    """m^p is outside of float32's range, the mean's root is not."""
    for scale in (1e-15, 1e15):
        x = normal(4, 256) * scale
        options = spec(estimator=estimator, p=p, eps=0.0)
        rho = kernel(x, None, options).rho
        assert relative(rho, rho64(x, options, None)) <= rho_error(x, options, None)


def test_eps_counts() -> None:
    x = normal(4, 64) * 1e-3
    for eps in (1e-6, 1e-5, 1e-12):
        options = spec(eps=eps)
        expected = rho64(x, options, None)
        assert relative(kernel(x, None, options).rho, expected) <= rho_error(x, options, None)


def step(values: Tensor, scales: Tensor) -> Tensor:
    """Distance from each element to the next larger one of its format, in units of the input."""
    elem = ELEMENT_DTYPES[values.dtype]
    smallest = math.log2(torch.finfo(values.dtype).smallest_normal)
    exponent = values.double().abs().log2().floor().clamp(min=smallest)
    scale = e8m0_to_float(scales).double().repeat_interleave(32, dim=-1)
    return torch.exp2(exponent - elem.mantissa_bits) * scale


def dequantize64(values: Tensor, scales: Tensor) -> Tensor:
    return values.double() * e8m0_to_float(scales).double().repeat_interleave(32, dim=-1)


@each_value(weighted=[False, True], elem_dtype={"e4m3": E4M3, "e5m2": E5M2}, estimator=ESTIMATORS)
def test_close_to_functional(
    estimator: dict[str, Any], elem_dtype: torch.dtype, weighted: bool
) -> None:
    """One element in 10,000 may fall on the other side of a border, no further than one step."""
    x, weight = normal(256, 1024, dtype=BF16), gain(1024, BF16) if weighted else None
    options = spec(**estimator, elem_dtype=elem_dtype)
    actual = kernel(x, weight, options, config=RowTiling(64, 1, 8))
    expected = reference(x, weight, options)
    differs = actual.values.view(torch.uint8) != expected.values.view(torch.uint8)
    other_scale = actual.scales.view(torch.uint8) != expected.scales.view(torch.uint8)
    differs |= other_scale.repeat_interleave(32, dim=-1)
    assert differs.float().mean() <= 1e-4
    apart = dequantize64(*actual[:2]) - dequantize64(*expected[:2])
    steps = torch.maximum(step(*actual[:2]), step(*expected[:2]))
    assert (apart.abs() <= steps).all()
