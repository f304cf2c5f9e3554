"""Launch the kernel that casts in both directions. Traceable, as ``launch`` is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.launch import Config, Rows, row_config, tile_blocks
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both_kernel
from mxnorm_pass.numerics.norm_cast import NormCastSpec

_HEIGHT = 128


@dataclass(frozen=True)
class Configuration:
    """How a call is cut into programs.

    Attributes:
        rows: the row programs'; their warps are everybody's.
        height, columns: of a column program's tile, powers of two; at least 128 and 32.
        lag: groups of ``height`` rows between the cast along D and the cast along T, at least 1.
            As many must stay in the L2 cache.
        ahead: rows between a row program's and those that it asks the L2 cache for; 0: none.
    """

    rows: Config
    columns: int
    lag: int
    height: int = _HEIGHT
    ahead: int = 0


# What of x and of the residual is to wait in the L2 cache: with less, programs wait for rho; with
# more, rows are read from DRAM again.
_WAITING_BYTES = 2**23
# What of them to ask the L2 cache for in advance. The requests of narrow rows cost more than they
# save.
_AHEAD_BYTES = 2**21
_AHEAD_FROM = 8192


def configuration(width: int, row_bytes: int) -> Configuration:
    """For rows of ``width`` elements, whatever their number.

    Args:
        row_bytes: of a row of x, and of the residual's, if there is one.
    """
    # Not ``row_config``'s: the warps cast the small tiles of columns, too.
    rows = Config(max(1, 4096 // triton.next_power_of_2(width)), row_config(width).chunks, warps=4)
    return Configuration(
        rows,
        columns=64 if width <= 8192 else 128,
        lag=max(1, round(_WAITING_BYTES / (_HEIGHT * row_bytes))),
        ahead=_AHEAD_BYTES // row_bytes if width >= _AHEAD_FROM else 0,
    )


def norm_cast_both(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    spec: NormCastSpec,
    gain_in_rows: bool,
    residual: Tensor | None = None,
    config: Configuration | None = None,
    dequantize: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """``functional.mxnorm_cast_both`` as one kernel.

    Args:
        x: [..., D], float32, bfloat16 or float16; T, the product of the leading dimensions, and D
            divisible by 32, T not 0. ``coverage.uncovered_both`` says what else.
        residual: of x's shape; it is added to x before the norm.
        dequantize: return values * scales in this dtype in the place of values and scales.

    Returns:
        total where there is a residual; values and scales, or what they make dequantised; rho,
        values_t, scales_t.
    """
    width = x.shape[-1]
    read = [x] if residual is None else [x, residual]
    config = config or configuration(width, width * sum(t.element_size() for t in read))
    rows = Rows.of(x, weight, block_weights, spec, residual, dequantize)
    values_t = x.new_empty((width, rows.count), dtype=spec.elem_dtype)
    scales_t = x.new_empty((width, rows.count // 32), dtype=torch.uint8)
    groups = (rows.count + config.height - 1) // config.height
    programs = config.height // config.rows.rows + (width + config.columns - 1) // config.columns
    launch.launcher(norm_cast_both_kernel)[(groups * programs,)](
        *rows.pointers,
        values_t,
        scales_t,
        x.new_zeros((groups * config.height,), dtype=torch.int32),
        rows.count // 32,
        *rows.strides,
        **rows.constants,
        GAIN_IN_ROWS=gain_in_rows,
        ROWS=config.rows.rows,
        TILE_K=tile_blocks(width, spec, config.rows),
        CHUNKS=config.rows.chunks,
        R=config.height,
        C=config.columns,
        LAG=config.lag,
        AHEAD=config.ahead,
        num_warps=config.rows.warps,
    )
    return *rows.results, values_t, scales_t.view(torch.float8_e8m0fnu)
