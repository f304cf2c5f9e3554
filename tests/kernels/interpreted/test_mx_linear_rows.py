"""The kernel of few rows, in tilings that no shape here has by itself."""

from __future__ import annotations

import pytest
import torch
from kernel_rows import DEVICE
from mx_linears import assert_within_bound, bytes_of, operand

from mxnorm_pass.kernels.mx_linear_rows import RowsTiling, configuration, mx_linear_rows


@pytest.mark.parametrize("config", [RowsTiling(8, 16, 4, 2), RowsTiling(16, 64, 2, 3)])
def test_tilings(config: RowsTiling) -> None:
    x, weight = operand(20, 512, 0), operand(72, 512, 1)
    y = torch.empty(20, 72, device=DEVICE)
    mx_linear_rows(*bytes_of(x, weight), None, y, config)
    assert_within_bound(y, x, weight)


def test_words_divide_the_width() -> None:
    for width in (128, 384, 4096, 11008, 14336):
        for rows, columns in ((2, 4096), (8, 1024), (16, 4096), (32, 64)):
            config = configuration(rows, columns, width)
            assert width % (128 * config.words) == 0 and config.rows >= rows
