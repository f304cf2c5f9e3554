"""Launch the kernel that casts in both directions. Traceable, as ``launch`` is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxnorm_pass.kernels.launch import as_rows, constants, launcher, scales_shape
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both_kernel
from mxnorm_pass.spec import NormCastSpec


@dataclass(frozen=True)
class Configuration:
    """How a call is cut into tiles.

    Attributes:
        rows: of a tile, a power of two of at least 32.
        columns: of a tile, a power of two of at least 128.
        warps: of a program.
        lag: programs between the sum of a tile and its cast. At least twice the tiles across a
            row, so that no program waits for one that started later; as many tiles must stay in
            the L2 cache.
        ticket: number the programs as they start, instead of relying on the grid's order.
        square: columns of a warp's squares, 32 or 64.
    """

    rows: int
    columns: int
    warps: int
    lag: int
    ticket: bool = True
    square: int = 64


def configuration(width: int) -> Configuration:
    """For rows of ``width`` elements, whatever their number."""
    columns = 128
    # More than are resident at once, so that nobody waits; 12 MiB of bfloat16 in the L2 cache.
    lag = max(1536, 2 * ((width + columns - 1) // columns))
    return Configuration(rows=32, columns=columns, warps=4, lag=lag, square=32)


def norm_cast_both(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    spec: NormCastSpec,
    gain_in_rows: bool,
    residual: Tensor | None = None,
    config: Configuration | None = None,
) -> tuple[Tensor, ...]:
    """``functional.mxnorm_cast_both`` as one kernel.

    Args:
        x: [..., D], float32, bfloat16 or float16; T, the product of the leading dimensions, and D
            divisible by 32, T not 0. ``coverage.uncovered_both`` says what else.
        residual: of x's shape; it is added to x before the norm.

    Returns:
        total where there is a residual; values, scales, rho, values_t, scales_t.
    """
    width = x.shape[-1]
    config = config or configuration(width)
    x_rows = as_rows(x)
    rows = x_rows.shape[0]
    residual_rows = None if residual is None else as_rows(residual)
    total = None
    if residual is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    values = x.new_empty(x.shape, dtype=spec.elem_dtype)
    scales = x.new_empty(scales_shape(x, spec), dtype=torch.uint8)
    rho = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    values_t = x.new_empty((width, rows), dtype=spec.elem_dtype)
    scales_t = x.new_empty((width, rows // 32), dtype=torch.uint8)
    # The blocked layout is padded to 128 rows.
    padded = (rows + 127) // 128 * 128 if spec.scale_layout == "blocked" else rows
    groups = (padded + config.rows - 1) // config.rows
    tiles = groups * ((width + config.columns - 1) // config.columns)
    launcher(norm_cast_both_kernel)[(tiles + config.lag,)](
        x_rows, residual_rows, weight, block_weights, total, values, scales, rho, values_t,
        scales_t, x.new_zeros(((tiles + groups) * config.rows + 1,), dtype=torch.int32),
        rows // 32, x_rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0), config.lag,
        **constants(spec, width, weight, block_weights, (x if total is None else total).dtype),
        GAIN_IN_ROWS=gain_in_rows, R=config.rows, C=config.columns, S=config.square,
        TICKET=config.ticket, num_warps=config.warps,
    )  # fmt: skip
    e8m0 = torch.float8_e8m0fnu
    results = (values, scales.view(e8m0), rho, values_t, scales_t.view(e8m0))
    return results if total is None else (total, *results)
