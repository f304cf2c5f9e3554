"""Norm, cast along D and cast along T of one tensor, which is read from DRAM once.

The tensor is cut into tiles of ``R`` rows and ``C`` columns; the tiles that share rows are a
group. A program sums its tile's part of the rows' statistic, and casts another tile, ``lag``
tiles back, whose group has been summed by then. That tile comes from the L2 cache, so ``lag``
tiles must fit there. The wait for its group ends always: a program counts in before it waits,
and it waits for programs that started before it, whichever of them are resident.
With ``lag`` 0 a program holds its tile in registers until the group is summed; then all programs
of a group must be resident at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.estimate import rms_constant
from mxnorm_pass.formats import element_format
from mxnorm_pass.kernels.mx import absmax_bits, blocked_scale_offset, cast_blocks
from mxnorm_pass.kernels.rounding import narrow, round_to, widen
from mxnorm_pass.spec import NormCastSpec

COVERED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """``x``, float32, rounded to the dtype of that name, in float32; None: as it is."""
    if dtype == "bfloat16":
        x = round_to(x, tl.bfloat16)
    elif dtype == "float16":
        x = round_to(x, tl.float16)
    return x


@triton.jit
def _partial_sums(x, block_weights_ptr, block, blocks, ESTIMATOR: tl.constexpr, P: tl.constexpr):
    """[R]: what the columns of the tile ``x`` [R, C] add to the rows' statistic."""
    x = widen(x)
    if ESTIMATOR == "exact":
        return tl.sum(x * x, 1)
    in_blocks = tl.reshape(x, [x.shape[0], x.shape[1] // 32, 32])
    absmax = absmax_bits(in_blocks, 2).to(tl.float32, bitcast=True)
    if P == 2:
        absmax = absmax * absmax
    if block_weights_ptr is not None:
        weights = tl.load(block_weights_ptr + block, block < blocks, 0.0)
        absmax = absmax * widen(weights)[None, :]
    return tl.sum(absmax, 1)


@triton.jit
def _inverse_rms(partials_ptr, across, factor, eps, squared: tl.constexpr, R: tl.constexpr,
                 ACROSS: tl.constexpr):  # fmt: skip
    """[R]: rho of a group's rows from its tiles' sums [across, R], added in one fixed order."""
    tile = tl.arange(0, ACROSS)[:, None]
    sums = tl.load(partials_ptr + tile * R + tl.arange(0, R)[None, :], tile < across, 0.0)
    mean = tl.sum(sums, 0) * factor
    if squared:
        mean = mean * mean
    return tl.rsqrt(mean + eps)


@triton.jit
def _normalize(x, rho, gain, NORM: tl.constexpr, PRODUCT: tl.constexpr, OUT: tl.constexpr):
    """``functional.normalize`` of a tile [R, C], in float32."""
    y = _round(x * rho[:, None], NORM)
    if gain is not None:
        y = _round(y * gain[None, :], PRODUCT)
    return _round(y, OUT)


@triton.jit
def _row_absmax(x, rho, y, from_x: tl.constexpr):
    """Bits of the absmax of ``y``'s blocks [R, C / 32, 32]; of x rho where that is the same."""
    if from_x:
        absmax = absmax_bits(tl.reshape(x, y.shape), 2).to(tl.float32, bitcast=True)
        return (absmax * rho[:, None]).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return absmax_bits(y, 2)


@triton.jit
def _wait(counter_ptr, arrivals):
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < arrivals:
        pass


@triton.jit
def _store_rows(y, absmax, values_ptr, scales_ptr, row, column, block, rows, blocks,
                MODE: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                BLOCKED: tl.constexpr):  # fmt: skip
    """Cast ``y`` [R, C / 32, 32] along its rows and store it."""
    elem_dtype: tl.constexpr = values_ptr.dtype.element_ty
    values, exponent = cast_blocks(y, absmax, 2, MODE, elem_dtype, MAX_EXPONENT, MANTISSA_BITS)
    width = blocks * 32
    tl.store(
        values_ptr + (row[:, None] * width + column[None, :]),
        tl.reshape(values, [y.shape[0], y.shape[1] * 32]),
        (row < rows)[:, None] & (column < width)[None, :],
    )
    inside = (row < rows)[:, None] & (block < blocks)[None, :]
    if BLOCKED:
        across = (blocks + 3) // 4
        offset = blocked_scale_offset(row[:, None], block[None, :], across)
        exponent = tl.where(inside, exponent, 0)
        inside = (row < (rows + 127) // 128 * 128)[:, None] & (block < across * 4)[None, :]
    else:
        offset = row[:, None] * blocks + block[None, :]
    tl.store(scales_ptr + offset, exponent.to(tl.uint8), inside)


@triton.jit
def _store_columns(y, values_ptr, scales_ptr, row, column, rows, width,
                   MODE: tl.constexpr, MAX_EXPONENT: tl.constexpr,
                   MANTISSA_BITS: tl.constexpr):  # fmt: skip
    """Cast ``y`` [R, C] along its columns and store it transposed."""
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    elem_dtype: tl.constexpr = values_ptr.dtype.element_ty
    in_blocks = tl.reshape(y, [R // 32, 32, C])
    absmax = absmax_bits(in_blocks, 1)
    values, exponent = cast_blocks(
        in_blocks, absmax, 1, MODE, elem_dtype, MAX_EXPONENT, MANTISSA_BITS
    )
    column = column.to(tl.int64)
    # Transposed as bytes: a quarter of what float32 would move.
    tl.store(
        values_ptr + (column[:, None] * rows + row[None, :]),
        tl.trans(tl.reshape(values, [R, C])),
        (column < width)[:, None] & (row < rows)[None, :],
    )
    block = tl.min(tl.reshape(row, [R // 32, 32]), 1) // 32
    tl.store(
        scales_ptr + (column[:, None] * (rows // 32) + block[None, :]),
        tl.trans(exponent.to(tl.uint8)),
        (column < width)[:, None] & (block * 32 < rows)[None, :],
    )


@triton.jit
def _cast(
    x, rho, gain, values_ptr, scales_ptr, values_t_ptr, scales_t_ptr, row, column, block, rows,
    blocks, ESTIMATOR: tl.constexpr, GAIN_IN_ROWS: tl.constexpr, MODE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, NORM: tl.constexpr,
    PRODUCT: tl.constexpr, OUT: tl.constexpr, BLOCKED: tl.constexpr,
):  # fmt: skip
    """Both casts of the tile ``x`` [R, C], float32."""
    row_gain = gain if GAIN_IN_ROWS else None
    if ESTIMATOR == "exact":
        y = _normalize(x, rho, row_gain, NORM, PRODUCT, OUT)
    else:
        y = _normalize(x, rho, row_gain, None, None, None)
    y = tl.reshape(y, [x.shape[0], x.shape[1] // 32, 32])
    absmax = _row_absmax(x, rho, y, ESTIMATOR != "exact" and row_gain is None)
    _store_rows(y, absmax, values_ptr, scales_ptr, row, column, block, rows, blocks, MODE,
                MAX_EXPONENT, MANTISSA_BITS, BLOCKED)  # fmt: skip
    y = _normalize(x, rho, gain, NORM, PRODUCT, OUT)
    _store_columns(y, values_t_ptr, scales_t_ptr, row, column, rows, blocks * 32, MODE,
                   MAX_EXPONENT, MANTISSA_BITS)  # fmt: skip


@triton.jit
def _load(x_ptr, stride, row, column, rows, width):
    inside = ((row >= 0) & (row < rows))[:, None] & (column < width)[None, :]
    return tl.load(x_ptr + (row[:, None] * stride + column[None, :]), inside, 0.0)


@triton.jit
def norm_cast_both_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, block_weights_ptr, values_ptr, scales_ptr, rho_ptr,
    values_t_ptr, scales_t_ptr, partials_ptr, counters_ptr,
    x_stride, residual_stride, row_blocks, blocks, lag, factor, eps,
    ESTIMATOR: tl.constexpr, P: tl.constexpr, GAIN_IN_ROWS: tl.constexpr, MODE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, NORM: tl.constexpr,
    PRODUCT: tl.constexpr, OUT: tl.constexpr, BLOCKED: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, ACROSS: tl.constexpr, HOLD: tl.constexpr, TICKET: tl.constexpr,
):  # fmt: skip
    rows, width = row_blocks * 32, blocks * 32
    across = tl.cdiv(width, C)
    tiles = tl.num_programs(0) - lag
    if TICKET:
        # Programs in the order in which they start.
        mine = tl.atomic_add(counters_ptr + tiles // across, 1, sem="relaxed")
    else:
        mine = tl.program_id(0)
    row = (mine // across).to(tl.int64) * R + tl.arange(0, R)
    column = mine % across * C + tl.arange(0, C)
    block = mine % across * (C // 32) + tl.arange(0, C // 32)
    x = _load(x_ptr, x_stride, row, column, rows, width)
    if residual_ptr is not None:
        residual = _load(residual_ptr, residual_stride, row, column, rows, width)
        x = narrow(widen(x) + widen(residual), total_ptr.dtype.element_ty)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        tl.store(total_ptr + (row[:, None] * width + column[None, :]), x, inside)
    late = mine - lag
    if HOLD:
        held, late_row, late_column = x, row, column
    else:
        late_row = (tl.maximum(late, 0) // across).to(tl.int64) * R + tl.arange(0, R)
        late_column = tl.maximum(late, 0) % across * C + tl.arange(0, C)
        held = x
        if residual_ptr is None:
            held = _load(x_ptr, x_stride, late_row, late_column, tl.where(late < 0, 0, rows), width)
    if mine < tiles:
        sums = _partial_sums(x, block_weights_ptr, block, blocks, ESTIMATOR, P)
        tl.store(partials_ptr + mine.to(tl.int64) * R + tl.arange(0, R), sums)
        tl.debug_barrier()
        tl.atomic_add(counters_ptr + mine // across, 1, sem="release")
    if late >= 0:
        group = late // across
        _wait(counters_ptr + group, across)
        rho = _inverse_rms(
            partials_ptr + group.to(tl.int64) * across * R, across, factor, eps,
            ESTIMATOR != "exact" and P == 1, R, ACROSS,
        )  # fmt: skip
        if late % across == 0:
            tl.store(rho_ptr + late_row, rho, late_row < rows)
        if not HOLD and residual_ptr is not None:
            held = _load(total_ptr, width, late_row, late_column, rows, width)
        gain = None
        if weight_ptr is not None:
            gain = widen(tl.load(weight_ptr + late_column, late_column < width, 0.0))
        _cast(
            widen(held), rho, gain, values_ptr, scales_ptr, values_t_ptr, scales_t_ptr,
            late_row, late_column, late % across * (C // 32) + tl.arange(0, C // 32), rows, blocks,
            ESTIMATOR, GAIN_IN_ROWS, MODE, MAX_EXPONENT, MANTISSA_BITS, NORM, PRODUCT, OUT, BLOCKED,
        )  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """How one call is cut up.

    Attributes:
        rows: of a tile, a power of two of at least 32.
        columns: of a tile, a power of two of at least 128.
        warps: of a program.
        lag: tiles between the sum of a tile and its cast; at least a group, or 0 to hold tiles.
        ticket: number the programs as they start, instead of relying on the grid's order.
    """

    rows: int
    columns: int
    warps: int
    lag: int
    ticket: bool = True


def configuration(width: int, dtype: torch.dtype) -> Configuration:
    columns = 128 if dtype.itemsize > 2 else 256
    across = triton.cdiv(width, columns)
    return Configuration(rows=64, columns=columns, warps=8, lag=max(384, across))


def uncovered(
    x: Tensor, weight: Tensor | None, spec: NormCastSpec, residual: Tensor | None = None
) -> str | None:
    """Why the kernel cannot do this, or None."""
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.dtype not in COVERED_DTYPES:
            return f"{name} is {tensor.dtype}"
    if spec.block_size != 32:
        return f"block_size is {spec.block_size}, not 32"
    if spec.estimator == "mxnorm" and spec.p not in (1, 2):
        return f"p is {spec.p}, neither 1 nor 2"
    if x.shape[-1] % 32 != 0:
        return f"the last dimension, {x.shape[-1]}, is not divisible by 32"
    if x.shape[:-1].numel() % 32 != 0:
        return f"the number of rows, {x.shape[:-1].numel()}, is not divisible by 32"
    return None


def norm_cast_both(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    spec: NormCastSpec,
    gain_in_rows: bool,
    residual: Tensor | None = None,
    config: Configuration | None = None,
) -> tuple[Tensor, ...]:
    """``functional.mxnorm_cast_both`` in one kernel, of ``x + residual`` where there is one.

    Args:
        x: [..., D], float32, bfloat16 or float16; T, the product of the leading dimensions, and D
            divisible by 32.
        weight: [D] or None; block_weights: [D / 32] or None.
        residual: of ``x``'s shape, or None.

    Returns:
        Those of ``functional.mxnorm_cast_both``; with a residual the sum before them, in the dtype
        that torch's addition gives it.

    Raises:
        ValueError: the kernel does not cover this; the message is that of ``uncovered``.
    """
    reason = uncovered(x, weight, spec, residual)
    if reason is not None:
        raise ValueError(f"norm_cast_both: {reason}")
    width = x.shape[-1]
    config = config or configuration(width, x.dtype)
    flat = _rows(x)
    results = _allocate(x, flat.shape[0], spec)
    values, scales, rho, values_t, scales_t = results
    total, flat_residual = None, None
    if residual is not None:
        total = torch.empty(
            x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device
        )
        flat_residual = _rows(residual.expand(x.shape))
    if flat.shape[0] > 0:
        across = triton.cdiv(width, config.columns)
        # Scales in the blocked layout are padded to whole tiles of 128 rows.
        height = 128 if spec.scale_layout == "blocked" else 1
        groups = triton.cdiv(triton.cdiv(flat.shape[0], height) * height, config.rows)
        counters = torch.zeros(groups + 1, dtype=torch.int32, device=x.device)
        partials = torch.empty(groups * across * config.rows, device=x.device)
        _launch((groups * across + config.lag,))(
            flat, flat_residual, total, weight, block_weights, values, scales, rho, values_t,
            scales_t, partials, counters, flat.stride(0),
            0 if flat_residual is None else flat_residual.stride(0), flat.shape[0] // 32,
            width // 32, config.lag, _factor(width, spec, block_weights), spec.eps,
            GAIN_IN_ROWS=gain_in_rows, ACROSS=triton.next_power_of_2(across), R=config.rows,
            C=config.columns, HOLD=config.lag == 0, TICKET=config.ticket,
            num_warps=config.warps, **_constants(spec, weight),
        )  # fmt: skip
    e8m0 = torch.float8_e8m0fnu
    results = (values, scales.view(e8m0), rho, values_t, scales_t.view(e8m0))
    return results if total is None else (total, *results)


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _allocate(x: Tensor, rows: int, spec: NormCastSpec) -> tuple[Tensor, ...]:
    width = x.shape[-1]
    blocks = width // 32

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    leading = x.shape[:-1]
    blocked = (32 * triton.cdiv(rows, 128), 16 * triton.cdiv(blocks, 4))
    return (
        empty(*x.shape, dtype=spec.elem_dtype),
        empty(
            *(blocked if spec.scale_layout == "blocked" else (*leading, blocks)),
            dtype=torch.uint8,
        ),
        empty(*leading, 1, dtype=torch.float32),
        empty(width, rows, dtype=spec.elem_dtype),
        empty(width, rows // 32, dtype=torch.uint8),
    )


def _factor(width: int, spec: NormCastSpec, block_weights: Tensor | None) -> float:
    """What turns a row's sum into its mean square, or for p = 1 into the root of it."""
    if spec.estimator == "exact":
        return 1.0 / width
    if block_weights is not None:
        return 1.0
    return 32.0 / (width * rms_constant(spec.p, 32) ** spec.p)


def _constants(spec: NormCastSpec, weight: Tensor | None) -> dict[str, Any]:
    element = element_format(spec.elem_dtype)
    product = spec.norm_dtype or torch.float32
    if weight is not None:
        product = torch.promote_types(product, weight.dtype)
    return {
        "ESTIMATOR": spec.estimator,
        "P": int(spec.p),
        "MODE": spec.scale_mode,
        "MAX_EXPONENT": element.max_exponent,
        "MANTISSA_BITS": element.mantissa_bits,
        "NORM": _name(spec.norm_dtype),
        "PRODUCT": _name(product),
        "OUT": _name(spec.out_dtype),
        "BLOCKED": spec.scale_layout == "blocked",
    }


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _launch(grid: tuple[int, ...]) -> Any:
    if isinstance(norm_cast_both_kernel, triton.runtime.JITFunction):
        return torch.library.wrap_triton(norm_cast_both_kernel)[grid]
    return norm_cast_both_kernel[grid]
