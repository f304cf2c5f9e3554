"""The row kernel in every format, bit for bit under its own rho."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from edge_cases import STACKED_EDGE_CASES, EdgeCase
from kernel_rows import (
    BF16,
    F32,
    assert_cast_equals,
    assert_same_bits,
    kernel,
    launched,
    reference,
    spec,
)
from numerics import gain, normal
from pairwise import each_value, pairwise, some
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.kernels.rows import RowTiling
from mxnorm_pass.numerics.formats import ELEMENTS, SCALE_MODES
from mxnorm_pass.numerics.norm_cast import NormCastSpec

# Five blocks of 32: no power of two, as the tile is.
WIDTH = 160
MANY_ROWS = RowTiling(128, 1, 8)
NAMES = {name: f"mxfp{element.bits} {name}" for name, element in ELEMENTS.items()}
FEW_BITS = {name: format for name, format in NAMES.items() if "fp8" not in format}
TENSOR_SCALES = {"no tensor scale": None, "tensor scale": 2.0**-9 / 3}


def tensor_scale_of(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor(value)


def assert_dequantized(
    x: Tensor,
    weight: Tensor | None,
    options: NormCastSpec,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
    **more: Any,
) -> None:
    more["tensor_scale"] = tensor_scale
    *_, actual, rho = launched(x, weight, options, dequantize=dtype, **more)
    residual = more.get("residual")
    total = x if residual is None else x + residual
    quantized = reference(total, weight, options, tensor_scale=tensor_scale, rho=rho)
    expected = functional.mx_dequantize(
        quantized.values, quantized.scales, dtype, format=options.format, tensor_scale=tensor_scale
    )
    assert_same_bits(actual, expected, f"dequantized to {dtype}")


@pairwise(
    layout=["row-major", "blocked"],
    elements=NAMES,
    mode=SCALE_MODES,
    estimator=["mxnorm", "exact"],
)
def test_elements_and_modes(estimator: Any, mode: str, elements: str, layout: str) -> None:
    options = spec(format=f"{elements} {mode} block 32", estimator=estimator, scale_layout=layout)
    x = normal(5, WIDTH, dtype=BF16)
    assert_cast_equals(x, gain(WIDTH, BF16), options, config=RowTiling(64, 1, 8))


@pairwise(
    layout=["row-major", "blocked"],
    tensor_scale=TENSOR_SCALES,
    gain_dtype={"no gain": None, "gain": BF16},
    estimator=["mxnorm", "exact"],
    block_size=[16, 32],
)
def test_nvfp4(
    block_size: int,
    estimator: Any,
    gain_dtype: torch.dtype | None,
    tensor_scale: float | None,
    layout: Any,
) -> None:
    name = f"nvfp4 e2m1 nearest block {block_size}"
    options = spec(format=name, estimator=estimator, scale_layout=layout)
    weight = None if gain_dtype is None else gain(WIDTH, gain_dtype)
    # Some scales are the smallest and some the largest there is.
    x = (normal(8, WIDTH) * torch.logspace(-4, 5, WIDTH)).to(BF16)
    scale = tensor_scale_of(tensor_scale)
    actual = assert_cast_equals(x, weight, options, tensor_scale=scale)
    if scale is not None:
        assert {2.0**-6, 448.0} <= set(actual.scales.float().flatten().tolist())


@each_value(block_size=[16, 64, 128], elements=FEW_BITS)
def test_block_sizes(elements: str, block_size: int) -> None:
    options = spec(format=f"{elements} rceil block {block_size}")
    assert_cast_equals(normal(3, 384, dtype=BF16), gain(384, BF16), options)


# Those of 6 bits in the two modes that carry.
CASTS: dict[str, tuple[str, float | None]] = {
    **{
        f"{name} {mode}": (f"{format} {mode} block 32", None)
        for name, format in FEW_BITS.items()
        for mode in (SCALE_MODES if name == "e2m1" else ("rceil", "even"))
    },
    "nvfp4": ("nvfp4", None),
    "nvfp4 of a tensor": ("nvfp4", 0.003),
    "nvfp4 of a huge tensor": ("nvfp4", 2.0**100),
    "nvfp4 of nearly nothing": ("nvfp4", 2.0**-120),
}


@some(
    default=[
        "e2m1 rceil-fp32-all_of_one_width",
        "e3m2 even-bf16-all_of_one_width",
        "nvfp4-bf16-all_of_one_width",
        "nvfp4 of a tensor-fp32-one_block",
        "e2m3 rceil-fp32-one_block",
    ],
    cast=CASTS,
    dtype={"bf16": BF16, "fp32": F32},
    case={case.name: case for case in STACKED_EDGE_CASES},
)
def test_edge_cases(case: EdgeCase, dtype: torch.dtype, cast: tuple[str, float | None]) -> None:
    x, (format, value) = case.x(dtype), cast
    options, scale = spec(format=format), tensor_scale_of(value)
    assert_cast_equals(x, None, options, config=MANY_ROWS, tensor_scale=scale)
    assert_dequantized(x, None, options, dtype, scale, config=MANY_ROWS)


@some(
    default=["e2m3-rceil", "e3m2-even", "e2m1-rceil", "e2m1-floor"],
    elements=NAMES,
    mode=SCALE_MODES,
)
def test_special_gains(mode: str, elements: str) -> None:
    assert_special_gains(f"{elements} {mode} block 32", None)


@pytest.mark.parametrize("value", TENSOR_SCALES.values(), ids=list(TENSOR_SCALES))
def test_special_gains_of_nvfp4(value: float | None) -> None:
    assert_special_gains("nvfp4", value)


def assert_special_gains(format: str, value: float | None) -> None:
    """A gain makes infinite, huge and tiny blocks of a row whose inverse RMS is ordinary."""
    weight = gain(WIDTH)
    for block, special in enumerate((math.inf, -math.inf, math.nan, 1e38, 1e-40)):
        weight[32 * block + 7] = special
    weight[128:] *= 1e-38
    options, scale = spec(format=format, norm_dtype=None, out_dtype=F32), tensor_scale_of(value)
    x = normal(5, WIDTH)
    assert_cast_equals(x, weight, options, tensor_scale=scale)
    assert_dequantized(x, weight, options, F32, scale)


@each_value(dtype=[BF16, F32], cast=["mxfp6", "mxfp6 e3m2", "mxfp4", "nvfp4"])
def test_residual_gain_and_chunks(cast: str, dtype: torch.dtype) -> None:
    x, residual = normal(5, WIDTH, dtype=dtype), normal(5, WIDTH, seed=1, dtype=BF16)
    weight, options, config = gain(WIDTH, BF16), spec(format=cast), RowTiling(8, 2, 4)
    given: dict[str, Any] = {"config": config}
    if cast == "nvfp4":
        given["tensor_scale"] = torch.tensor(0.02)
    total, *results = launched(x, weight, options, residual=residual, **given)
    assert_same_bits(total, x + residual, "total")
    of_total = kernel(x + residual, weight, options, **given)
    for name, actual, expected in zip(of_total._fields, results, of_total, strict=True):
        assert_same_bits(actual, expected, name)
    assert_dequantized(x, weight, options, dtype, residual=residual, **given)
