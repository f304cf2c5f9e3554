"""Norm, cast along D and cast along T of one tensor, which is read from DRAM once.

The tensor is cut into tiles of ``R`` rows and ``C`` columns; the tiles that share rows are a
group. Program i sums its tile's part of the rows' statistic; one program a group, ``lag // 2``
later, turns the parts into rho; and ``lag`` programs later each tile is read again, from the L2
cache, and cast. Numbers are handed on through memory that starts as zeros: a word that is not zero
is there (see ``_publish``), which needs neither counters nor fences. Programs wait only for those
that started before them, so all waits end, whichever of them are resident.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.mx import absmax_bits, blocked_scale_offset, cast_blocks
from mxnorm_pass.kernels.rounding import narrow, widen
from mxnorm_pass.kernels.statistic import inverse_rms, normalize

SIGN = tl.constexpr(-(2**31))


@triton.jit
def _digits(eight, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """Square of 32 rows, row in it, and column of the eights of elements of a tile.

    The index of an eight has the digits (a, g, h, b, c), of sizes (S / 8, R / 32, C / S, 256 / S,
    S / 8); the row has (g, b, a), the column (h, c). Triton gives eights to the lanes of a warp,
    then to the warps, then to a thread again: a warp has squares of 32 rows and S columns, whose
    blocks need no other warp in either direction; a thread has 8 columns of S / 8 rows.
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
def _load(ptr, row, column, stride, rows, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
          S: tl.constexpr):  # fmt: skip
    """The tile that begins at (row, column), zero outside."""
    offsets, inside = _offsets(row, column, stride, rows, D, R, C, S)
    return tl.load(ptr + offsets, inside, 0.0)


@triton.jit
def _load_sum(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, rows,
              D: tl.constexpr, TOTAL_DTYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
              S: tl.constexpr):  # fmt: skip
    """The tile of x; with a residual the rounded sum, stored where there is a ``total_ptr``."""
    x = _load(x_ptr, row, column, x_stride, rows, D, R, C, S)
    if residual_ptr is not None:
        residual = _load(residual_ptr, row, column, residual_stride, rows, D, R, C, S)
        x = narrow(widen(x) + widen(residual), TOTAL_DTYPE)
        if total_ptr is not None:
            offsets, inside = _offsets(row, column, D, rows, D, R, C, S)
            tl.store(total_ptr + offsets, x, inside)
    return x


@triton.jit
def _row_blocks(x, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """A tile as [S / 8, R / 32, C / S, 256 / S, S / 32, 32], blocks along D last."""
    return tl.reshape(x, [S // 8, R // 32, C // S, 256 // S, S // 32, 32])


@triton.jit
def _partial_sums(x, block_weights_ptr, column, D: tl.constexpr, EXACT: tl.constexpr,
                  P: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """[R]: what the columns of the tile ``x`` add to the rows' statistic."""
    in_blocks = _row_blocks(widen(x), R, C, S)
    if EXACT:
        sums = tl.sum(in_blocks * in_blocks, 5)
    else:
        sums = absmax_bits(in_blocks, 5).to(tl.float32, bitcast=True)
        if P == 2.0:
            sums = sums * sums
        if block_weights_ptr is not None:
            block = column // 32 + tl.arange(0, C // 32)
            weights = widen(tl.load(block_weights_ptr + block, block < D // 32, 0.0))
            sums = sums * tl.reshape(weights, [1, 1, C // S, 1, S // 32])
    return tl.reshape(tl.permute(tl.sum(tl.sum(sums, 4), 2), 1, 2, 0), [R])


@triton.jit
def _publish(ptr, x):
    """Store float32 as words that are not zero: the sign is flipped, and there is no -0."""
    tl.store(ptr, tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True) ^ SIGN)


@triton.jit
def _peek(ptr, mask):
    return tl.load(ptr, mask, 1, volatile=True)


@triton.jit
def _await(ptr, words, mask):
    """What :func:`_publish` stored at ``ptr``; ``words`` is an early look, 1 outside ``mask``."""
    while tl.min((words != 0).to(tl.int32)) == 0:
        words = _peek(ptr, mask)
    return tl.where(mask, words ^ SIGN, 0).to(tl.float32, bitcast=True)


@triton.jit
def _publish_rho(rho_words_ptr, partials_ptr, rho_ptr, row, rows, ACROSS: tl.constexpr,
                 EPS: tl.constexpr, P: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr,
                 R: tl.constexpr):  # fmt: skip
    """rho of the group of rows from ``row`` on; its tiles' parts are added in one fixed order."""
    tile = tl.arange(0, triton.next_power_of_2(ACROSS))[:, None]
    parts_ptr = partials_ptr + tile * R + tl.arange(0, R)[None, :]
    inside = tl.broadcast_to(tile < ACROSS, parts_ptr.shape)
    sums = tl.sum(_await(parts_ptr, _peek(parts_ptr, inside), inside), 0)
    rho = inverse_rms(sums, sums, EPS, P, FACTOR, SCALE)
    row += tl.arange(0, R)
    _publish(rho_words_ptr + row, rho)
    tl.store(rho_ptr + row, rho, row < rows)


@triton.jit
def _load_gain(weight_ptr, column, width, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """[1, R C / S, 8], float32, of a tile's elements: a thread's rows share it."""
    g, row_in, column_in = _digits(tl.arange(0, R * C // S)[:, None], R, C, S)
    column = column + column_in + tl.arange(0, 8)[None, :]
    return widen(tl.load(weight_ptr + column, column < width, 0.0))[None, :, :]


@triton.jit
def _store_rows(y, values_ptr, scales_ptr, row, column, rows, D: tl.constexpr, MODE: tl.constexpr,
                MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCKED: tl.constexpr,
                R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Cast the tile ``y``, blocks in its last dimension, along its rows and store it."""
    absmax = absmax_bits(y, 5)
    elem_dtype: tl.constexpr = values_ptr.dtype.element_ty
    values, exponent = cast_blocks(y, absmax, 5, MODE, elem_dtype, MAX_EXPONENT, MANTISSA_BITS)
    offsets, inside = _offsets(row, column, D, rows, D, R, C, S)
    tl.store(values_ptr + offsets, tl.reshape(values, [R * C // 8, 8]), inside)
    exponent = tl.reshape(tl.permute(exponent, 1, 3, 0, 2, 4), [R, C // 32])
    row = row + tl.arange(0, R)[:, None]
    block = column // 32 + tl.arange(0, C // 32)[None, :]
    inside = (row < rows) & (block < D // 32)
    if BLOCKED:
        across: tl.constexpr = (D + 127) // 128
        offsets = blocked_scale_offset(row, block, across)
        exponent = tl.where(inside, exponent, 0)
        inside = (row < (rows + 127) // 128 * 128) & (block < across * 4)
    else:
        offsets = row.to(tl.int64) * (D // 32) + block
    tl.store(scales_ptr + offsets, exponent.to(tl.uint8), inside)


@triton.jit
def _store_columns(y, values_ptr, scales_ptr, row, column, rows, D: tl.constexpr,
                   MODE: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                   R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Cast the tile ``y`` along its columns and store it transposed."""
    elem_dtype: tl.constexpr = values_ptr.dtype.element_ty
    y = tl.reshape(y, [S // 8, R // 32, C // S, 256 // S, S // 8, 8])
    # A thread holds consecutive rows: transposed first, they are packed four to a register.
    y = tl.reshape(tl.permute(y, 2, 4, 5, 1, 3, 0), [C, R // 32, 32])
    values, exponent = cast_blocks(
        y, absmax_bits(y, 2), 2, MODE, elem_dtype, MAX_EXPONENT, MANTISSA_BITS
    )
    column = column + tl.arange(0, C)[:, None]
    inside = column < D
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
    x, rho, gain, values_ptr, scales_ptr, values_t_ptr, scales_t_ptr, row, column, rows,
    D: tl.constexpr, EXACT: tl.constexpr, GAIN_IN_ROWS: tl.constexpr, MODE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, NORM_DTYPE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr, BLOCKED_SCALES: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Both casts of the tile ``x``, float32, that begins at (row, column)."""
    row_gain = gain if GAIN_IN_ROWS else None
    if EXACT:
        y = normalize(x, rho, row_gain, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE)
    else:
        # Its blocks' maxima are those of x times rho: rounding is monotonic.
        y = normalize(x, rho, row_gain, tl.float32, tl.float32, tl.float32)
    y = _row_blocks(y, R, C, S)
    _store_rows(y, values_ptr, scales_ptr, row, column, rows, D, MODE, MAX_EXPONENT,
                MANTISSA_BITS, BLOCKED_SCALES, R, C, S)  # fmt: skip
    y = normalize(x, rho, gain, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE)
    _store_columns(y, values_t_ptr, scales_t_ptr, row, column, rows, D, MODE, MAX_EXPONENT,
                   MANTISSA_BITS, R, C, S)  # fmt: skip


@triton.jit
def norm_cast_both_kernel(
    x_ptr, residual_ptr, weight_ptr, block_weights_ptr, total_ptr, values_ptr, scales_ptr, rho_ptr,
    values_t_ptr, scales_t_ptr, zeros_ptr, row_blocks, x_stride, residual_stride, lag,
    D: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, EXACT: tl.constexpr,
    P: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr, MODE: tl.constexpr,
    ELEM_DTYPE: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    NORM_DTYPE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr,
    TOTAL_DTYPE: tl.constexpr, BLOCKED_SCALES: tl.constexpr, GAIN_IN_ROWS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, S: tl.constexpr, TICKET: tl.constexpr,
):  # fmt: skip
    """Grid: tiles + lag. A tile is a tensor [R C / 8, 8], see ``_digits``.

    Args:
        zeros_ptr: int32 [tiles R + groups R + 1]: parts of sums, rho, the next ticket.
        row_blocks: rows / 32, so that the compiler sees that rows are a multiple.
        TICKET: number the programs as they start, instead of relying on the grid's order.
    """
    tl.static_assert(BLOCK == 32, "blocks of 32")
    ACROSS: tl.constexpr = (D + C - 1) // C
    rows = row_blocks * 32
    tiles = tl.num_programs(0) - lag
    rho_words_ptr = zeros_ptr + tiles.to(tl.int64) * R
    mine = tl.program_id(0)
    if TICKET:
        mine = tl.atomic_add(rho_words_ptr + tiles // ACROSS * R, 1, sem="relaxed")
    row, column = mine // ACROSS * R, mine % ACROSS * C
    x = _load_sum(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, rows, D,
                  TOTAL_DTYPE, R, C, S)  # fmt: skip
    late = tl.maximum(mine - lag, 0)
    late_row, late_column = late // ACROSS * R, late % ACROSS * C
    # Asked for here, it arrives while the other tile is summed up.
    late_rows = tl.where(mine < lag, 0, rows)
    late_x = _load_sum(x_ptr, residual_ptr, None, late_row, late_column, x_stride, residual_stride,
                       late_rows, D, TOTAL_DTYPE, R, C, S)  # fmt: skip
    g, row_in, column_in = _digits(tl.arange(0, R * C // 8), R, C, S)
    late_rho_ptr = rho_words_ptr + late_row + g * 32 + row_in
    some = late_row + g * 32 < late_rows
    rho_words = _peek(late_rho_ptr, some)
    gain = None
    if weight_ptr is not None:
        gain = _load_gain(weight_ptr, late_column, D, R, C, S)
    if mine < tiles:
        sums = _partial_sums(x, block_weights_ptr, column, D, EXACT, P, R, C, S)
        _publish(zeros_ptr + mine.to(tl.int64) * R + tl.arange(0, R), sums)
    summed = mine - lag // 2
    if (summed >= 0) & (summed < tiles) & (summed % ACROSS == 0):
        _publish_rho(rho_words_ptr, zeros_ptr + summed.to(tl.int64) * R, rho_ptr,
                     summed // ACROSS * R, rows, ACROSS, EPS, P, FACTOR, SCALE, R)  # fmt: skip
    if mine >= lag:
        rho = _await(late_rho_ptr, rho_words, some)
        _cast(
            tl.reshape(widen(late_x), [S // 8, R * C // S, 8]),
            tl.reshape(rho, [S // 8, R * C // S, 1]), gain,
            values_ptr, scales_ptr, values_t_ptr, scales_t_ptr, late_row, late_column, rows,
            D, EXACT, GAIN_IN_ROWS, MODE, MAX_EXPONENT, MANTISSA_BITS, NORM_DTYPE, PRODUCT_DTYPE,
            OUT_DTYPE, BLOCKED_SCALES, R, C, S,
        )  # fmt: skip
