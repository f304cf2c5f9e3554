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
def _digits(eight, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """Square of 32 rows, row in it, and column of the eights of elements of a tile.

    The index of an eight has the digits (a, g, h, b, c), of sizes (S / 8, R / 32, C / S, 256 / S,
    S / 8); the row has (g, b, a), the column (h, c).
    """
    c = eight % (S // 8)
    b = eight // (S // 8) % (256 // S)
    h = eight // 32 % (C // S)
    g = eight // 32 // (C // S) % (R // 32)
    a = eight // (R * C // S)
    return g, b * (S // 8) + a, h * S + c * 8


@triton.jit
def _offsets(row, column, stride, rows, width, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """Offsets and mask, [R C / 8, 8], of the tile that begins at (row, column)."""
    g, row_in, column_in = _digits(tl.arange(0, R * C // 8)[:, None], R, C, S)
    # Rows and columns end with whole blocks.
    inside = (row + g * 32 < rows) & (column + column_in < width)
    column = column + column_in + tl.arange(0, 8)[None, :]
    row = row + g * 32 + row_in
    return row.to(tl.int64) * stride + column, tl.broadcast_to(inside, column.shape)


@triton.jit
def _row_blocks(x, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """A tile as [S / 8, R / 32, C / S, 256 / S, S / 32, 32], blocks along D last."""
    return tl.reshape(x, [S // 8, R // 32, C // S, 256 // S, S // 32, 32])


@triton.jit
def _partial_sums(x, block_weights_ptr, column, blocks, ESTIMATOR: tl.constexpr, P: tl.constexpr,
                  R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """[R]: what the columns of the tile ``x`` add to the rows' statistic."""
    in_blocks = _row_blocks(widen(x), R, C, S)
    if ESTIMATOR == "exact":
        sums = tl.sum(in_blocks * in_blocks, 5)
    else:
        sums = absmax_bits(in_blocks, 5).to(tl.float32, bitcast=True)
        if P == 2:
            sums = sums * sums
        if block_weights_ptr is not None:
            block = column // 32 + tl.arange(0, C // 32)
            weights = widen(tl.load(block_weights_ptr + block, block < blocks, 0.0))
            sums = sums * tl.reshape(weights, [1, 1, C // S, 1, S // 32])
    return tl.reshape(tl.permute(tl.sum(tl.sum(sums, 4), 2), 1, 2, 0), [R])


@triton.jit
def _inverse_rms(partials_ptr, factor, eps, squared: tl.constexpr, R: tl.constexpr,
                 ACROSS: tl.constexpr):  # fmt: skip
    """[R]: rho of a group's rows from its tiles' sums [across, R], added in one fixed order."""
    tile = tl.arange(0, triton.next_power_of_2(ACROSS))[:, None]
    sums = tl.load(partials_ptr + tile * R + tl.arange(0, R)[None, :], tile < ACROSS, 0.0)
    mean = tl.sum(sums, 0) * factor
    if squared:
        mean = mean * mean
    return tl.rsqrt(mean + eps)


@triton.jit
def _count_in(sums, partials_ptr, counters_ptr, rho_ptr, tile, rows, factor, eps,
              squared: tl.constexpr, R: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """Publish a tile's sums; the last tile of its group turns them into rho."""
    group = tile // ACROSS
    tl.store(partials_ptr + tile.to(tl.int64) * R + tl.arange(0, R), sums)
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + group, 1, sem="acq_rel") == ACROSS - 1:
        first = (group * ACROSS).to(tl.int64) * R
        rho = _inverse_rms(partials_ptr + first, factor, eps, squared, R, ACROSS)
        row = group * R + tl.arange(0, R)
        tl.store(rho_ptr + row, rho, row < rows)
        tl.debug_barrier()
        tl.atomic_add(counters_ptr + group, 1, sem="release")


@triton.jit
def _wait(counter_ptr, across):
    """Until a group has its rho: its tiles have counted in, and the last of them once more."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") <= across:
        pass


@triton.jit
def _load_rho(rho_ptr, row, rows, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """[S / 8, R C / S, 1], of a tile's elements."""
    g, row_in, column_in = _digits(tl.arange(0, R * C // 8), R, C, S)
    rho = tl.load(rho_ptr + row + g * 32 + row_in, row + g * 32 < rows, 0.0)
    return tl.reshape(rho, [S // 8, R * C // S, 1])


@triton.jit
def _load_gain(weight_ptr, column, width, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """[1, R C / S, 8], float32, of a tile's elements: a thread's rows share it."""
    g, row_in, column_in = _digits(tl.arange(0, R * C // S)[:, None], R, C, S)
    column = column + column_in + tl.arange(0, 8)[None, :]
    return widen(tl.load(weight_ptr + column, column < width, 0.0))[None, :, :]


@triton.jit
def _normalize(x, rho, gain, NORM: tl.constexpr, PRODUCT: tl.constexpr, OUT: tl.constexpr):
    """``functional.normalize`` of a tile, in float32."""
    y = _round(x * rho, NORM)
    if gain is not None:
        y = _round(y * gain, PRODUCT)
    return _round(y, OUT)


@triton.jit
def _store_rows(y, absmax, values_ptr, scales_ptr, row, column, rows, blocks,
                MODE: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                BLOCKED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                S: tl.constexpr):  # fmt: skip
    """Cast the tile ``y``, blocks in its last dimension, along its rows and store it."""
    elem_dtype: tl.constexpr = values_ptr.dtype.element_ty
    values, exponent = cast_blocks(y, absmax, 5, MODE, elem_dtype, MAX_EXPONENT, MANTISSA_BITS)
    width = blocks * 32
    offsets, inside = _offsets(row, column, width, rows, width, R, C, S)
    tl.store(values_ptr + offsets, tl.reshape(values, [R * C // 8, 8]), inside)
    exponent = tl.reshape(tl.permute(exponent, 1, 3, 0, 2, 4), [R, C // 32])
    row = row + tl.arange(0, R)[:, None]
    block = column // 32 + tl.arange(0, C // 32)[None, :]
    inside = (row < rows) & (block < blocks)
    if BLOCKED:
        across = (blocks + 3) // 4
        offsets = blocked_scale_offset(row, block, across)
        exponent = tl.where(inside, exponent, 0)
        inside = (row < (rows + 127) // 128 * 128) & (block < across * 4)
    else:
        offsets = row.to(tl.int64) * blocks + block
    tl.store(scales_ptr + offsets, exponent.to(tl.uint8), inside)


@triton.jit
def _store_columns(y, values_ptr, scales_ptr, row, column, rows, width, MODE: tl.constexpr,
                   MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, R: tl.constexpr,
                   C: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Cast the tile ``y`` along its columns and store it transposed."""
    elem_dtype: tl.constexpr = values_ptr.dtype.element_ty
    y = tl.reshape(y, [S // 8, R // 32, C // S, 256 // S, S // 8, 8])
    # A thread holds consecutive rows: transposed first, they are packed four to a register.
    y = tl.reshape(tl.permute(y, 2, 4, 5, 1, 3, 0), [C, R // 32, 32])
    values, exponent = cast_blocks(
        y, absmax_bits(y, 2), 2, MODE, elem_dtype, MAX_EXPONENT, MANTISSA_BITS
    )
    column = column + tl.arange(0, C)[:, None]
    inside = column < width
    column = column.to(tl.int64)
    block = row // 32 + tl.arange(0, R // 32)[None, :]
    row = row + tl.arange(0, R)[None, :]
    tl.store(values_ptr + column * rows + row, tl.reshape(values, [C, R]), inside & (row < rows))
    tl.store(
        scales_ptr + column * (rows // 32) + block,
        exponent.to(tl.uint8),
        inside & (block * 32 < rows),
    )


@triton.jit
def _cast(
    x, rho, gain, values_ptr, scales_ptr, values_t_ptr, scales_t_ptr, row, column, rows, blocks,
    ESTIMATOR: tl.constexpr, GAIN_IN_ROWS: tl.constexpr, MODE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, NORM: tl.constexpr,
    PRODUCT: tl.constexpr, OUT: tl.constexpr, BLOCKED: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Both casts of the tile ``x``, float32, that begins at (row, column)."""
    row_gain = gain if GAIN_IN_ROWS else None
    if ESTIMATOR == "exact":
        y = _row_blocks(_normalize(x, rho, row_gain, NORM, PRODUCT, OUT), R, C, S)
    else:
        # Rounding is monotonic, so this has the bits of the blocks' maxima times rho, too.
        y = _row_blocks(_normalize(x, rho, row_gain, None, None, None), R, C, S)
    _store_rows(y, absmax_bits(y, 5), values_ptr, scales_ptr, row, column, rows, blocks, MODE,
                MAX_EXPONENT, MANTISSA_BITS, BLOCKED, R, C, S)  # fmt: skip
    y = _normalize(x, rho, gain, NORM, PRODUCT, OUT)
    _store_columns(y, values_t_ptr, scales_t_ptr, row, column, rows, blocks * 32, MODE,
                   MAX_EXPONENT, MANTISSA_BITS, R, C, S)  # fmt: skip


@triton.jit
def norm_cast_both_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, block_weights_ptr, values_ptr, scales_ptr, rho_ptr,
    values_t_ptr, scales_t_ptr, partials_ptr, counters_ptr,
    x_stride, residual_stride, row_blocks, blocks, lag, factor, eps,
    ESTIMATOR: tl.constexpr, P: tl.constexpr, GAIN_IN_ROWS: tl.constexpr, MODE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, NORM: tl.constexpr,
    PRODUCT: tl.constexpr, OUT: tl.constexpr, BLOCKED: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, ACROSS: tl.constexpr, HOLD: tl.constexpr,
    TICKET: tl.constexpr,
):  # fmt: skip
    """Grid: tiles + lag. A tile is a tensor [R C / 8, 8], see ``_digits``.

    Triton gives eights to the lanes of a warp, then to the warps, then to a thread again: a warp
    has squares of 32 rows and S columns, whose blocks need no other warp in either direction, and
    a thread has 8 columns of S / 8 consecutive rows.
    """
    rows, width = row_blocks * 32, blocks * 32
    tiles = tl.num_programs(0) - lag
    if TICKET:
        # Programs in the order in which they start.
        mine = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    else:
        mine = tl.program_id(0)
    row, column = mine // ACROSS * R, mine % ACROSS * C
    offsets, inside = _offsets(row, column, x_stride, rows, width, R, C, S)
    x = tl.load(x_ptr + offsets, inside, 0.0)
    if residual_ptr is not None:
        offsets, inside = _offsets(row, column, residual_stride, rows, width, R, C, S)
        residual = tl.load(residual_ptr + offsets, inside, 0.0)
        x = narrow(widen(x) + widen(residual), total_ptr.dtype.element_ty)
        offsets, inside = _offsets(row, column, width, rows, width, R, C, S)
        tl.store(total_ptr + offsets, x, inside)
    late = mine - lag
    late_row, late_column, held = row, column, x
    if not HOLD:
        tile = tl.maximum(late, 0)
        late_row, late_column = tile // ACROSS * R, tile % ACROSS * C
        if residual_ptr is None:
            some_rows = tl.where(late < 0, 0, rows)
            offsets, inside = _offsets(late_row, late_column, x_stride, some_rows, width, R, C, S)
            held = tl.load(x_ptr + offsets, inside, 0.0)
    if mine < tiles:
        sums = _partial_sums(x, block_weights_ptr, column, blocks, ESTIMATOR, P, R, C, S)
        _count_in(sums, partials_ptr, counters_ptr + 1, rho_ptr, mine, rows, factor, eps,
                  ESTIMATOR != "exact" and P == 1, R, ACROSS)  # fmt: skip
    if late >= 0:
        gain = None
        if weight_ptr is not None:
            gain = _load_gain(weight_ptr, late_column, width, R, C, S)
        _wait(counters_ptr + 1 + late // ACROSS, ACROSS)
        if not HOLD and residual_ptr is not None:
            offsets, inside = _offsets(late_row, late_column, width, rows, width, R, C, S)
            held = tl.load(total_ptr + offsets, inside, 0.0)
        rho = _load_rho(rho_ptr, late_row, rows, R, C, S)
        _cast(
            tl.reshape(widen(held), [S // 8, R * C // S, 8]),
            rho, gain, values_ptr, scales_ptr, values_t_ptr,
            scales_t_ptr, late_row, late_column, rows, blocks, ESTIMATOR, GAIN_IN_ROWS, MODE,
            MAX_EXPONENT, MANTISSA_BITS, NORM, PRODUCT, OUT, BLOCKED, R, C, S,
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
        square: columns of a warp's squares, 32 or 64.
    """

    rows: int
    columns: int
    warps: int
    lag: int
    ticket: bool = True
    square: int = 64


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
            GAIN_IN_ROWS=gain_in_rows, ACROSS=across, R=config.rows,
            C=config.columns, S=config.square, HOLD=config.lag == 0, TICKET=config.ticket,
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
    c: float = rms_constant(spec.p, 32) ** spec.p
    return 32.0 / (width * c)


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
