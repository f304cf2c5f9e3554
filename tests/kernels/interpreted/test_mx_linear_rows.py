"""The kernel of few rows, in tilings that no shape here has by itself."""

from __future__ import annotations

import pytest
from mx_linears import assert_within_bound, launched, linears_of, operand

from mxnorm_pass.kernels.mx_linear_rows import RowsTiling, configuration, mx_linear_rows


@pytest.mark.parametrize(
    ("config", "width"),
    [
        # One step, and copies of more.
        (RowsTiling(16, 16, 4, 4), 512),
        (RowsTiling(8, 32, 1, 4), 128),
        # As many steps as stages, fewer and more.
        (RowsTiling(8, 32, 2, 3), 768),
        (RowsTiling(16, 64, 1, 2), 640),
        (RowsTiling(32, 32, 4, 2), 1024),
        (RowsTiling(8, 16, 1, 5), 384),
    ],
    ids=str,
)
def test_tilings(config: RowsTiling, width: int) -> None:
    rows = config.rows - 3
    x, weight = operand(rows, width, 0), operand(72, width, 1)
    (linear,) = linears_of(rows, [weight])
    mx_linear_rows(*launched(x), [linear], config)
    assert_within_bound(linear.y, x, weight)


def test_words_divide_the_width() -> None:
    for width in (128, 384, 4096, 11008, 14336):
        for rows, columns in ((2, 4096), (8, 1024), (16, 4096), (32, 64), (32, 28672)):
            config = configuration(rows, columns, width)
            assert width % (128 * config.warps) == 0 and config.rows >= rows
            assert config.columns >= 16 and config.stages >= 2
