"""The kernel that casts in both directions against ``functional``, bit for bit given its rho.

Only rho may differ, since it comes from a sum whose order is free: by the rounding of that sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from edge_cases import STACKED_EDGE_CASES, EdgeCase, bits_equal, describe_difference
from example_counts import examples
from formats import spec_with
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import each_value
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.kernels import coverage
from mxnorm_pass.kernels.norm_cast_both import Tiling, norm_cast_both
from mxnorm_pass.kernels.rows import RowTiling
from mxnorm_pass.numerics.elements import round_to_elements
from mxnorm_pass.numerics.formats import ELEMENTS, SCALE_MODES, BlockFormat, ElementFormat
from mxnorm_pass.numerics.layout import blocked_scales
from mxnorm_pass.numerics.norm_cast import NormCastSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SPEC = NormCastSpec(1e-5, "mxnorm", 2.0, BlockFormat.of(E4M3), BF16, BF16, "row-major")
SMALL = (
    Tiling(RowTiling(rows=8, chunks=1, warps=4), columns=64, lag=1),
    Tiling(RowTiling(rows=32, chunks=1, warps=4), columns=32, lag=2),
    Tiling(RowTiling(rows=16, chunks=1, warps=8), columns=128, lag=9, height=256, ahead=40),
)
# The interpreter takes its time for each program.
MANY_ROWS = Tiling(RowTiling(rows=64, chunks=1, warps=4), columns=128, lag=1)
ONE_UNIT = 2.0**-24


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs() -> Iterator[None]:
    """Uninitialised memory holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def casts_given_rho(
    x: Tensor,
    weight: Tensor | None,
    rho: Tensor,
    spec: NormCastSpec,
    gain_in_rows: bool,
    tensor_scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """values, scales, values_t and scales_t, from ``functional``'s norm and MX cast."""
    along_rows: tuple[torch.dtype | None, torch.dtype] = (None, F32)
    if spec.estimator == "exact":
        along_rows = (spec.norm_dtype, spec.out_dtype)
    row_weight = weight if gain_in_rows else None
    if row_weight is not None and spec.estimator == "mxnorm":
        row_weight = row_weight.float()
    y = functional.normalize(x, rho, row_weight, *along_rows)
    values, scales = functional.mx_cast(y, spec.format, tensor_scale=tensor_scale)
    if spec.scale_layout == "blocked":
        scales = blocked_scales(scales.view(torch.uint8)).view(scales.dtype)
    y = functional.normalize(x, rho, weight, spec.norm_dtype, spec.out_dtype)
    along_t = y.reshape(-1, x.shape[-1]).t().contiguous()
    return values, scales, *functional.mx_cast(along_t, spec.format, tensor_scale=tensor_scale)


def check(
    results: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None,
    spec: NormCastSpec,
    gain_in_rows: bool = True,
    block_weights: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> None:
    values, scales, rho, values_t, scales_t = results
    size = spec.format.block_size
    expected_rho = functional.inverse_rms(
        x,
        eps=spec.eps,
        estimator=spec.estimator,
        p=spec.p,
        block_size=size,
        block_weights=block_weights,
    )
    # Both sums of n non-negative terms are within n units of the exact one; the square root
    # halves that, and a handful of roundings come before and after.
    terms = x.shape[-1] if spec.estimator == "exact" else x.shape[-1] // size
    tolerance = (max(terms, 2 * terms * (spec.p == 1)) + 8) * ONE_UNIT
    torch.testing.assert_close(rho, expected_rho, rtol=tolerance, atol=0, equal_nan=True)
    expected = casts_given_rho(x, weight, rho, spec, gain_in_rows, tensor_scale)
    names = ("values", "scales", "values_t", "scales_t")
    for name, a, b in zip(names, (values, scales, values_t, scales_t), expected, strict=True):
        assert a.is_contiguous()
        assert bits_equal(a, b), f"{name}: {describe_difference(a, b)}"


# Estimator, format, with a gain?
EDGE_SPECS = {
    "estimate": ("mxnorm", "mxfp8", True),
    "exact": ("exact", "mxfp8 e4m3fn even block 32", True),
    "e5m2": ("mxnorm", "mxfp8 e5m2 floor block 32", False),
    "e3m2": ("mxnorm", "mxfp6 e3m2 ceil block 32", False),
    "e2m1": ("exact", "mxfp4", True),
    "nvfp4": ("mxnorm", "nvfp4", True),
}


@each_value(options=EDGE_SPECS, case=STACKED_EDGE_CASES, dtype=[F32, BF16])
def test_edge_cases(case: EdgeCase, dtype: torch.dtype, options: tuple[Any, str, bool]) -> None:
    estimator, format, with_gain = options
    x = case.x(dtype).to(DEVICE)
    spec = spec_with(SPEC, format=format, estimator=estimator)
    weight = noise(x.shape[1]).to(dtype) if with_gain else None
    results = norm_cast_both(x, weight, None, spec, True, config=MANY_ROWS)
    check(results, x, weight, spec)


dtypes = st.sampled_from([F32, BF16, F16])
FORMATS = [
    *(f"mxfp8 {e} {mode} block 32" for e in ("e4m3fn", "e5m2") for mode in SCALE_MODES),
    *(f"mxfp6 {e} {mode} block 32" for e in ("e2m3", "e3m2") for mode in ("rceil", "even")),
    *(f"mxfp4 e2m1 {mode} block {size}" for mode in ("rceil", "floor") for size in (16, 64)),
    *("nvfp4", "nvfp4", "nvfp4 e2m1 nearest block 32"),
]


@pytest.mark.full
@settings(max_examples=examples(20), deadline=None, derandomize=True)
@given(
    blocks=st.tuples(st.integers(1, 5), st.integers(1, 11)),
    dtype=dtypes,
    weight_dtype=st.none() | dtypes,
    residual_dtype=st.none() | dtypes,
    gain_in_rows=st.booleans(),
    weighted=st.booleans(),
    padding=st.sampled_from([0, 32]),
    config=st.sampled_from(SMALL),
    tensor_scale=st.none() | st.sampled_from([2.0**-9 / 3, 1.0]),
    spec=st.builds(
        spec_with,
        st.just(SPEC),
        eps=st.sampled_from([1e-6, 0.5]),
        estimator=st.sampled_from(["mxnorm", "exact"]),
        p=st.sampled_from([1.0, 2.0]),
        format=st.sampled_from(FORMATS),
        norm_dtype=st.none() | dtypes,
        out_dtype=dtypes,
        scale_layout=st.sampled_from(["row-major", "blocked"]),
    ),
)
def test_any_options(
    blocks,
    dtype,
    weight_dtype,
    residual_dtype,
    gain_in_rows,
    weighted,
    padding,
    config,
    tensor_scale,
    spec,
) -> None:
    size = spec.format.block_size
    rows, width = size * blocks[0], size * blocks[1]
    x = (noise(rows, width + padding) * noise(rows, 1, seed=1).exp()).to(dtype)[:, :width]
    weight = None if weight_dtype is None else noise(width, seed=2).to(weight_dtype)
    block_weights = None
    if weighted and spec.estimator == "mxnorm":
        block_weights = noise(blocks[1], seed=3).square()
    scale = None
    if tensor_scale is not None and not spec.format.has_e8m0_scales:
        scale = torch.tensor(tensor_scale, device=DEVICE)
    residual, total = None, x
    if residual_dtype is not None:
        residual = noise(rows, width, seed=4).to(residual_dtype)
        total = x + residual
    given = {"tensor_scale": scale, "residual": residual, "config": config}
    results = norm_cast_both(x, weight, block_weights, spec, gain_in_rows, **given)
    if residual is not None:
        assert bits_equal(results[0], total)
        results = results[1:]
    check(results, total, weight, spec, gain_in_rows, block_weights, scale)


@pytest.mark.full
def test_results_do_not_depend_on_the_lag() -> None:
    x, weight = noise(224, 160).to(BF16), noise(160)
    configs = [replace(SMALL[1], lag=lag) for lag in (1, 2, 3, 4, 24)]
    first, *others = [norm_cast_both(x, weight, None, SPEC, True, config=c) for c in configs]
    check(first, x, weight, SPEC)
    for results in others:
        assert all(bits_equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("format", ["mxfp8", "mxfp6 e3m2", "mxfp4", "nvfp4"])
def test_dequantised_rows(format: str) -> None:
    x, residual, weight = (noise(160, 96, seed=i).to(BF16) for i in range(3))
    weight = weight[0]
    of_tensor = {"tensor_scale": torch.tensor(0.01, device=DEVICE)} if format == "nvfp4" else {}
    given = {"residual": residual, **of_tensor}
    spec = spec_with(SPEC, format=format)
    total, values, scales, *others = norm_cast_both(x, weight, None, spec, True, **given)
    for dtype in (BF16, F32):
        results = norm_cast_both(x, weight, None, spec, True, dequantize=dtype, **given)
        restored = functional.mx_dequantize(values, scales, dtype, format=format, **of_tensor)
        expected = (total, restored, *others)
        assert all(bits_equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.full
def test_rows_in_chunks() -> None:
    x, weight = noise(160, 288).to(BF16), noise(288).to(BF16)
    config = Tiling(RowTiling(rows=32, chunks=4, warps=4), columns=64, lag=1)
    check(norm_cast_both(x, weight, None, SPEC, True, config=config), x, weight, SPEC)


@pytest.mark.full
@pytest.mark.parametrize("chunks", [1, 2])
def test_one_row_per_program(chunks: int) -> None:
    x, weight = noise(32, 64).to(BF16), noise(64).to(BF16)
    config = Tiling(RowTiling(rows=1, chunks=chunks, warps=4), columns=64, lag=1)
    check(norm_cast_both(x, weight, None, SPEC, True, config=config), x, weight, SPEC)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["row-major", "blocked"])
def test_leading_dimensions_keep_their_shape(layout: str) -> None:
    spec = spec_with(SPEC, scale_layout=layout)
    x = noise(4, 3, 16, 96).to(BF16).transpose(0, 1)
    results = norm_cast_both(x, None, None, spec, True, config=SMALL[0])
    assert [tuple(t.shape) for t in results] == [
        (3, 4, 16, 96),
        (3, 4, 16, 3) if layout == "row-major" else (64, 16),
        (3, 4, 16, 1),
        (96, 192),
        (96, 6),
    ]
    assert results[1].dtype == results[4].dtype == torch.float8_e8m0fnu
    check(results, x, None, spec)


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (33, {}, "33 rows, which 32 does not divide"),
        (33, {"format": "nvfp4"}, "33 rows, which 16 does not divide"),
    ],
)
def test_what_is_not_covered_says_why(rows: int, changes: dict[str, Any], words: str) -> None:
    spec = spec_with(SPEC, **changes)
    assert words in (coverage.uncovered_both(noise(rows, 96), spec, None) or "")
    # The same call one step away meets only what all kernels ask for.
    near = noise(rows + -rows % 32, 96)
    assert coverage.uncovered_both(near, SPEC, None) == coverage.uncovered(near, SPEC)


@pytest.mark.full
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=list(ELEMENTS))
def test_bfloat16_times_a_scale_may_be_rounded_to_bfloat16(element: ElementFormat) -> None:
    """Compiled kernels multiply so: a product is exact, or elements take it for zero."""
    y = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(BF16).float()
    for exponent in range(-127, 127):
        product = y * 2.0**exponent
        cast = [round_to_elements(p, element) for p in (product, product.to(BF16).float())]
        assert bits_equal(*cast)
