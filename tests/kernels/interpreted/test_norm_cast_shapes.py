"""The row kernel over random shapes, strides and configurations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_rows import (
    BF16,
    DEVICE,
    F32,
    assert_cast_equals,
    assert_same_bits,
    kernel,
    launched,
    reference,
    spec,
)
from numerics import gain, normal
from torch import Tensor

from mxnorm_pass.kernels.norm_cast import norm_cast
from mxnorm_pass.kernels.rows import RowTiling, row_config, tile_blocks
from mxnorm_pass.numerics.formats import block_format


def strided(shape: tuple[int, ...], layout: str, dtype: torch.dtype = BF16) -> Tensor:
    """Gaussian [..., D] with the strides that ``layout`` names."""
    *leading, width = shape
    x = normal(*shape, dtype=dtype)
    match layout:
        case "contiguous":
            return x
        case "padded rows":
            room = normal(*leading, width + 8, seed=1, dtype=dtype)
            room[..., :width] = x
            return room[..., :width]
        case "transposed rows":
            return x.movedim(0, -2).contiguous().movedim(-2, 0)
        case "every second row":
            return x.repeat_interleave(2, dim=0)[::2]
        case "one row, expanded":
            return x[:1].expand(shape) if len(shape) > 1 else x
        case "columns first":
            return x.movedim(-1, 0).contiguous().movedim(0, -1)
        case "every second column":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
    raise AssertionError(layout)


LAYOUTS = (
    "contiguous",
    "padded rows",
    "transposed rows",
    "every second row",
    "one row, expanded",
    "columns first",
    "every second column",
)


FORMATS = ("mxfp8", "mxfp8", "mxfp6 e3m2", "mxfp4", "nvfp4")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    fmt = block_format(draw(st.sampled_from(FORMATS)))
    block_size = draw(st.sampled_from([16, 64, fmt.block_size, fmt.block_size, fmt.block_size]))
    blocks = draw(st.integers(1, 3200 // block_size))
    leading = draw(st.lists(st.integers(1, 5), max_size=3))
    whole = math.ceil(math.log2(blocks))
    layout = draw(st.sampled_from(LAYOUTS)) if leading else "contiguous"
    return {
        "x": strided((*leading, blocks * block_size), layout, draw(st.sampled_from([BF16, F32]))),
        "gain": draw(st.sampled_from([None, BF16, F32])),
        "residual": draw(st.booleans()),
        "options": spec(
            format=replace(fmt, block_size=block_size),
            estimator=draw(st.sampled_from(["mxnorm", "exact"])),
            p=draw(st.sampled_from([2.0, 2.0, 1.0, 1.5])),
            scale_layout=draw(st.sampled_from(["row-major", "blocked"])),
        ),
        # Many rows per program: the interpreter takes its time for each program, and a GPU has
        # room for 2^17 elements.
        "config": RowTiling(
            2 ** draw(st.integers(4, min(6, 17 - whole - block_size.bit_length() + 1))),
            2 ** draw(st.integers(0, min(whole, 3))),
            8,
        ),
    }


@settings(max_examples=examples(40), deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_any_shape(case: dict[str, Any]) -> None:
    x, options, config = case["x"], case["options"], case["config"]
    weight = None if case["gain"] is None else gain(x.shape[-1], case["gain"])
    if case["residual"]:
        residual = x.flip(0)
        total, *results = launched(x, weight, options, residual=residual, config=config)
        assert_same_bits(total, x + residual, "total")
        expected = reference(x + residual, weight, options, rho=results[2])
        for name, a, b in zip(expected._fields, results, expected, strict=True):
            assert_same_bits(a, b, name)
        rho, own = results[2], reference(x + residual, weight, options).rho
    else:
        rho = assert_cast_equals(x, weight, options, config=config).rho
        own = reference(x, weight, options).rho
    assert rho.shape == (*x.shape[:-1], 1)
    torch.testing.assert_close(rho, own, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_strides(layout: str) -> None:
    x = strided((3, 4, 96), layout)
    dense = x.contiguous()
    assert (layout == "contiguous") == (x.stride() == dense.stride())
    residual = normal(3, 4, 96, seed=2, dtype=BF16)
    for first, second in ((x, residual), (residual, x)):
        strided_results = launched(first, None, spec(), residual=second)
        dense_results = launched(first.contiguous(), None, spec(), residual=second.contiguous())
        for a, b in zip(strided_results, dense_results, strict=True):
            assert_same_bits(a, b, layout)


@pytest.mark.parametrize("layout", ["every second column", "expanded"])
def test_strided_gain_and_block_weights(layout: str) -> None:
    x = normal(4, 96, dtype=BF16)
    if layout == "expanded":
        weight, block_weights = torch.tensor([1.5]).expand(96), torch.tensor([0.1]).expand(3)
    else:
        weight, block_weights = gain(192)[::2], gain(6)[::2]
    strided_results = kernel(x, weight, spec(), block_weights=block_weights)
    dense = kernel(x, weight.contiguous(), spec(), block_weights=block_weights.contiguous())
    for name, a, b in zip(dense._fields, strided_results, dense, strict=True):
        assert_same_bits(a, b, name)


def test_offsets_beyond_int32() -> None:
    """Three rows 2^30 elements apart; only the pages that hold them are touched."""
    rows = normal(3, 64, dtype=BF16)
    storage = torch.UntypedStorage(2 * (2 * 2**30 + 64), device=DEVICE)
    x = torch.tensor([], dtype=BF16, device=DEVICE).set_(storage, 0, (3, 64), (2**30, 1))
    x.copy_(rows)
    near = kernel(rows, None, spec())
    for name, a, b in zip(near._fields, norm_cast(x, None, None, spec()), near, strict=True):
        assert_same_bits(a.cpu(), b, name)


@pytest.mark.parametrize("width", [32, 160, 2048, 4096, 5120, 16384, 32768, 65536])
@pytest.mark.parametrize("layout", ["row-major", "blocked"])
def test_default_configuration_covers_the_row(width: int, layout: Any) -> None:
    config = row_config(width)
    blocks = tile_blocks(width, spec(scale_layout=layout), config)
    for number in (config.rows, config.chunks, blocks):
        assert number >= 1 and number & (number - 1) == 0
    assert blocks * config.chunks * 32 >= width


@pytest.mark.parametrize("width", [5120, 32768])
def test_wide_rows_by_default(width: int) -> None:
    assert_cast_equals(normal(2, width, dtype=BF16), gain(width, BF16), spec())
