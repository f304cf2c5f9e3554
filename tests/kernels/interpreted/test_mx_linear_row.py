"""The kernel of one row, in tilings that no shape here has by itself."""

from __future__ import annotations

import pytest
from mx_linears import assert_within_bound, launched, linears_of, operand

from mxnorm_pass.kernels.mx_linear_row import RowTiling, configuration, mx_linear_row


@pytest.mark.parametrize(
    "config", [RowTiling(4, 512, 1), RowTiling(2, 256, 2), RowTiling(8, 128, 4)]
)
def test_tilings(config: RowTiling) -> None:
    x, weight = operand(1, 512, 0), operand(72, 512, 1)
    (linear,) = linears_of(1, [weight])
    mx_linear_row(*launched(x), [linear], config)
    assert_within_bound(linear.y, x, weight)


def test_chunks_divide_the_width() -> None:
    for width in (128, 384, 4096, 11008, 14336):
        config = configuration(width)
        assert width % config.chunk == 0 and config.warps in (1, 2, 4)
