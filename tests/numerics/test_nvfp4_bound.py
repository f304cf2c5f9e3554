"""NVFP4's tensor scale from what bounds a normalised row: the bound holds, is reached, and fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from edge_cases import bits_equal, describe_difference
from example_counts import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import U64, U, estimate_error, normal
from pairwise import pairwise
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.numerics.nvfp4 import block_scales
from mxnorm_pass.numerics.rms import Estimator

B, K = 16, 12
WIDTH = B * K
EPS = 1e-6
SMALLEST, LARGEST = 2.0**-6, 448.0
UNEVEN = torch.linspace(0.004, 0.02, K).roll(5)


@dataclass(frozen=True)
class Norm:
    """How a row is normalised, in rows of K blocks unless a test has its own."""

    estimator: Estimator
    p: float = 2.0
    block_weights: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        weights = self.block_weights
        return {"estimator": self.estimator, "p": self.p, "block_weights": weights}

    def bound(self, width: int = WIDTH, block_size: int = B) -> float:
        return functional.bound_of_normalized(
            self.estimator, self.p, width, block_size, self.block_weights
        )

    def error(self, width: int = WIDTH, block_size: int = B) -> float:
        """Bound on the relative error of x / rms in float32."""
        if self.estimator == "exact":
            # A square is rounded once, their sum and its division take D more, the root halves it.
            return (width / 2 + 4) * U
        # With weights one power and product more, see estimate_error and its other users.
        return 2 * estimate_error(self.p, width // block_size) + 5 * U


NORMS = {
    "exact": Norm("exact"),
    "p1": Norm("mxnorm", 1.0),
    "p2": Norm("mxnorm", 2.0),
    "p3.5": Norm("mxnorm", 3.5),
    "p1-weighted": Norm("mxnorm", 1.0, UNEVEN),
    "p2-weighted": Norm("mxnorm", 2.0, UNEVEN),
    "p3.5-weighted": Norm("mxnorm", 3.5, UNEVEN),
}
all_norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def row_at_the_bound(norm: Norm, dtype: torch.dtype = torch.float32) -> tuple[Tensor, int]:
    """[1, WIDTH], and the channel of the element that no other row can make larger.

    Of all rows with one element that large the others are 0, or in its block in an estimate,
    which sees no more than the block's largest. Of uneven weights that of the block is smallest.
    """
    block = 3 if norm.block_weights is None else int(norm.block_weights.argmin())
    x, channel = torch.zeros(1, WIDTH), block * B + 5
    if norm.estimator == "mxnorm":
        x[0, block * B : (block + 1) * B] = torch.linspace(-2.5, 2.0, B)
    x[0, channel] = -3.0
    return x.to(dtype), channel


# --- the bound ------------------------------------------------------------------------------


# Zeros, small and large numbers, so that a row may be of one block or one element.
ELEMENT = st.one_of(st.just(0), st.integers(-9, 9), st.integers(-(10**6), 10**6))


@st.composite
def rows_and_norms(draw: st.DrawFn) -> tuple[Tensor, Norm, int]:
    """A row in float64 that is not zero, a norm, and its block size."""
    block_size, count = draw(st.sampled_from([1, 2, 16])), draw(st.integers(1, 4))
    width = block_size * count
    row = draw(st.lists(ELEMENT, min_size=width, max_size=width))
    assume(any(row))
    x = torch.tensor([row], dtype=torch.float64)
    if draw(st.booleans()):
        return x, Norm("exact"), block_size
    weight = st.floats(1e-3, 10)
    weights = draw(st.none() | st.lists(weight, min_size=count, max_size=count).map(torch.tensor))
    return x, Norm("mxnorm", draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.7])), weights), block_size


@settings(max_examples=examples(200), deadline=None, derandomize=True)
@given(rows_and_norms())
def test_no_normalised_element_exceeds_the_bound(drawn: tuple[Tensor, Norm, int]) -> None:
    x, norm, block_size = drawn
    width = x.shape[-1]
    bound, error = norm.bound(width, block_size), norm.error(width, block_size)
    for rows, tolerance in ((x.float(), error), (x, error * U64 / U)):
        rho = functional.inverse_rms(rows, eps=0.0, block_size=block_size, **norm.options)
        assert (rows * rho).abs().max() <= bound * (1 + tolerance)


@all_norms
def test_one_row_reaches_the_bound(norm: Norm) -> None:
    x, channel = row_at_the_bound(norm, torch.float64)
    rho = functional.inverse_rms(x, eps=0.0, block_size=B, **norm.options)
    reached = float((x * rho)[0, channel].abs())
    assert reached == pytest.approx(norm.bound(), rel=norm.error() * U64 / U, abs=0)


def test_of_the_exact_rms_it_takes_a_single_element() -> None:
    x = torch.zeros(2, WIDTH, dtype=torch.float64)
    x[0, :2], x[1, 7] = 3.0, 3.0
    rho = functional.inverse_rms(x, eps=0.0, estimator="exact")
    two, one = (x * rho).abs().amax(-1).tolist()
    assert one == pytest.approx(math.sqrt(WIDTH), rel=4 * WIDTH * U64)
    assert two == pytest.approx(math.sqrt(WIDTH / 2), rel=4 * WIDTH * U64)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_a_block_without_weight_has_no_bound(p: float) -> None:
    weights = UNEVEN.clone()
    weights[4] = 0.0
    norm = Norm("mxnorm", p, weights)
    assert norm.bound() == math.inf
    x = torch.zeros(1, WIDTH)
    for size in (1.0, 1e10):
        x[0, 4 * B] = size
        rho = functional.inverse_rms(x, eps=EPS, block_size=B, **norm.options)
        assert float((x * rho).max()) == pytest.approx(size / math.sqrt(EPS))


# --- the tensor scale -----------------------------------------------------------------------


def test_the_scale_gives_the_bound_the_largest_block_scale() -> None:
    gain = torch.tensor([0.5, -3.0, 2.0])
    for scale, largest in (
        (functional.nvfp4_norm_tensor_scale(32.0), 32.0),
        (functional.nvfp4_norm_tensor_scale(32.0, gain), 96.0),
        (functional.nvfp4_norm_tensor_scale(32.0, gain.bfloat16()), 96.0),
    ):
        assert scale.shape == () and scale.dtype is torch.float32
        assert float(scale) == pytest.approx(largest / (LARGEST * 6), rel=2 * U)
        assert float(block_scales(torch.tensor([largest]), scale).float()) == LARGEST


def gain_that_is_largest_at(channel: int, dtype: torch.dtype) -> Tensor:
    gain = 0.1 * normal(WIDTH, seed=3)
    gain[channel] = -4.3
    return gain.to(dtype)


@pairwise(
    norm=NORMS,
    dtype={"fp32": torch.float32, "bf16": torch.bfloat16},
    gained={"plain": False, "gain": True},
)
def test_block_scales_fit_before_they_are_clamped(
    norm: Norm, dtype: torch.dtype, gained: bool
) -> None:
    """The largest element that there can be has the largest scale, and keeps its value."""
    spike, channel = row_at_the_bound(norm, dtype)
    x = torch.cat([spike, normal(16, WIDTH, dtype=dtype), spike * 2.0**10])
    gain = gain_that_is_largest_at(channel, dtype) if gained else None
    scale = functional.nvfp4_norm_tensor_scale(norm.bound(), gain)
    # The output is rounded to its dtype, once with its rms and once with the gain.
    tolerance = norm.error() + 2 * torch.finfo(dtype).eps
    y = functional.mxnorm(x, gain, eps=0.0, block_size=B, norm_dtype=dtype, **norm.options)
    before = y.float().abs().unflatten(-1, (K, B)).amax(-1) / 6 / scale
    assert before.max() <= LARGEST * (1 + tolerance)
    assert before[[0, -1], channel // B].min() >= LARGEST * (1 - tolerance)

    values, scales, _ = functional.mxnorm_cast(
        x, gain, eps=0.0, format="nvfp4", tensor_scale=scale, norm_dtype=dtype, **norm.options
    )
    assert (scales.float() <= LARGEST).all() and (scales.float() >= SMALLEST).all()
    back = functional.mx_dequantize(values, scales, format="nvfp4", tensor_scale=scale)
    largest = norm.bound() * (1.0 if gain is None else float(gain.abs().max()))
    assert float(back[0, channel].abs()) == pytest.approx(largest, rel=tolerance)


@pytest.mark.parametrize("exponent", [-5, -1, 1, 4])
def test_a_power_of_two_more_changes_nothing_in_range(exponent: int) -> None:
    """So what a wide bound costs is what falls below e4m3's normal values."""
    y = normal(32, WIDTH)
    scale = functional.nvfp4_tensor_scale(y) * 2.0**5
    moved = scale * 2.0**exponent
    values, scales = functional.mx_cast(y, "nvfp4", tensor_scale=scale)
    others, other_scales = functional.mx_cast(y, "nvfp4", tensor_scale=moved)
    assert torch.equal(values, others)
    assert torch.equal(scales.float(), other_scales.float() * 2.0**exponent)


def test_below_the_normal_values_blocks_lose_elements() -> None:
    y = normal(32, WIDTH)
    scale = functional.nvfp4_tensor_scale(y) * 2.0**20
    values, scales = functional.mx_cast(y, "nvfp4", tensor_scale=scale)
    assert (scales.float() == SMALLEST).all() and not values.bitwise_and(0x77).any()


# --- NaN, infinities and zeros --------------------------------------------------------------


@pairwise(
    norm=NORMS, value={"nan": math.nan, "inf": math.inf}, gained={"plain": False, "gain": True}
)
def test_what_is_not_finite_stays_in_its_row(norm: Norm, value: float, gained: bool) -> None:
    """Under the bound, which does not see it: with the largest element every row would be NaN."""
    x, broken = normal(4, WIDTH), 2
    planted = x.clone()
    planted[broken, 2 * B + 1] = value
    gain = 1 + 0.1 * normal(WIDTH, seed=1) if gained else None
    scale = functional.nvfp4_norm_tensor_scale(norm.bound(), gain)

    def there_and_back(x: Tensor) -> Tensor:
        values, scales, _ = functional.mxnorm_cast(
            x, gain, eps=EPS, format="nvfp4", tensor_scale=scale, **norm.options
        )
        return functional.mx_dequantize(values, scales, format="nvfp4", tensor_scale=scale)

    want, got = there_and_back(x), there_and_back(planted)
    others = torch.arange(4) != broken
    assert bits_equal(got[others], want[others]), describe_difference(got[others], want[others])
    in_block = torch.arange(WIDTH) // B == 2
    assert got[broken, in_block].isnan().all()
    # An infinite RMS makes zeros of the others.
    rest = got[broken, ~in_block]
    assert rest.isnan().all() if math.isnan(value) else not rest.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_of_elements_that_are_not_finite_makes_every_block_nan(value: float) -> None:
    x = normal(4, WIDTH)
    x[2, 5] = value
    scale = functional.nvfp4_tensor_scale(x)
    assert scale.isnan() if math.isnan(value) else scale.isinf()
    values, scales = functional.mx_cast(x, "nvfp4", tensor_scale=scale)
    back = functional.mx_dequantize(values, scales, format="nvfp4", tensor_scale=scale)
    assert back.isnan().all()


def test_scales_of_blocks_are_normal_values_or_nan() -> None:
    absmax = torch.tensor([0.0, 1e-30, 1.0, 1e30, math.inf, math.nan])
    for tensor_scale in (None, torch.tensor(0.25)):
        *numbers, nan = block_scales(absmax, tensor_scale).float().tolist()
        assert numbers[0] == numbers[1] == SMALLEST and numbers[3] == numbers[4] == LARGEST
        assert math.isnan(nan)


def test_a_gain_that_is_nan_makes_the_scale_nan() -> None:
    gain = torch.tensor([1.0, math.nan])
    assert functional.nvfp4_norm_tensor_scale(4.0, gain).isnan()


@all_norms
def test_a_gain_of_zeros_gives_zeros(norm: Norm) -> None:
    x, gain = normal(2, WIDTH), torch.zeros(WIDTH)
    scale = functional.nvfp4_norm_tensor_scale(norm.bound(), gain)
    assert float(scale) == 2.0**-120
    values, scales, _ = functional.mxnorm_cast(
        x, gain, eps=EPS, format="nvfp4", tensor_scale=scale, **norm.options
    )
    back = functional.mx_dequantize(values, scales, format="nvfp4", tensor_scale=scale)
    assert torch.equal(back, torch.zeros(2, WIDTH))
