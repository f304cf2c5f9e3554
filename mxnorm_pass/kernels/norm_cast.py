"""Row kernel: [residual add ->] statistic -> norm -> cast along D, in one pass over memory.

A program holds ``ROWS`` rows in registers. Rows too wide for that are cut into ``CHUNKS`` and swept
twice, for the statistic and for the cast; the second sweep finds them in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.device.cast import dequantize, scale_blocks
from mxnorm_pass.kernels.device.elements import lay_out_as_bytes, to_elements, words_of
from mxnorm_pass.kernels.device.mean_square import accumulate, inverse_rms, normalize
from mxnorm_pass.kernels.device.mx import absmax_bits, blocked_scale_offset
from mxnorm_pass.kernels.device.publish import publish
from mxnorm_pass.kernels.device.rounding import narrow, widen
from mxnorm_pass.kernels.rows import Rows, RowTiling, row_config, tile_blocks
from mxnorm_pass.numerics.norm_cast import NormCastSpec


@triton.jit
def norm_cast_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    block_weights_ptr,
    tensor_scale_ptr,
    total_ptr,
    values_ptr,
    scales_ptr,
    rho_ptr,
    dequantized_ptr,
    rows,
    x_stride,
    residual_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    EPS: tl.constexpr,
    EXACT: tl.constexpr,
    P: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    MODE: tl.constexpr,
    ELEM_DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MAX_MANTISSA: tl.constexpr,
    CONVERTS: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    TOTAL_DTYPE: tl.constexpr,
    BLOCKED_SCALES: tl.constexpr,
):
    """Pointers that are None: no such input, or a result that nobody asked for.

    Args:
        TILE_K: blocks per chunk, a power of two.
        FACTOR, SCALE: see ``mean_square.inverse_rms``.
        CONVERTS: see ``elements.to_elements``.
        PRODUCT_DTYPE: dtype of the product with the gain.
    """
    cast_rows(
        tl.program_id(0), x_ptr, residual_ptr, weight_ptr, block_weights_ptr, tensor_scale_ptr,
        total_ptr, values_ptr, scales_ptr, rho_ptr, None, dequantized_ptr, rows, x_stride,
        residual_stride, D, BLOCK, ROWS, TILE_K, CHUNKS, EPS, EXACT, P, FACTOR, SCALE, MODE,
        ELEM_DTYPE, BITS, MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA, CONVERTS, NORM_DTYPE,
        PRODUCT_DTYPE, OUT_DTYPE, TOTAL_DTYPE, BLOCKED_SCALES, "",
    )  # fmt: skip


@triton.jit
def cast_rows(
    program, x_ptr, residual_ptr, weight_ptr, block_weights_ptr, tensor_scale_ptr, total_ptr,
    values_ptr, scales_ptr, rho_ptr, words_ptr, dequantized_ptr, rows, x_stride, residual_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr,
    CHUNKS: tl.constexpr, EPS: tl.constexpr, EXACT: tl.constexpr, P: tl.constexpr,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, MODE: tl.constexpr, ELEM_DTYPE: tl.constexpr,
    BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    MAX_MANTISSA: tl.constexpr, CONVERTS: tl.constexpr, NORM_DTYPE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr, TOTAL_DTYPE: tl.constexpr,
    BLOCKED_SCALES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The work of one of the programs; see :func:`norm_cast_kernel`.

    Args:
        words_ptr: int32 zeros [rows], where rho is published; or None.
        KEEP: eviction policy of x.
    """
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    partial = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    tensor_scale = None
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
    for chunk in tl.static_range(CHUNKS):
        k = chunk * TILE_K + tl.arange(0, TILE_K)
        x = load_rows(
            x_ptr, residual_ptr, total_ptr, row, k, rows, x_stride, residual_stride,
            D, BLOCK, TOTAL_DTYPE, KEEP,
        )  # fmt: skip
        block_weights = None
        if block_weights_ptr is not None:
            block_weights = tl.load(block_weights_ptr + k, mask=k < D // BLOCK, other=0.0)
        if weight_ptr is not None and CHUNKS == 1:
            # Asked for here, the gain arrives while the rows are summed up.
            gain = load_gain(weight_ptr, k, D, BLOCK)
        partial, largest = accumulate(x, block_weights, partial, largest, EXACT, P)
    rho = inverse_rms(partial, largest, EPS, P, FACTOR, SCALE)
    tl.store(rho_ptr + row, rho, mask=row < rows)
    if words_ptr is not None:
        publish(words_ptr + row, rho, row < rows)

    for chunk in tl.static_range(CHUNKS):
        k = chunk * TILE_K + tl.arange(0, TILE_K)
        if CHUNKS > 1:
            x = load_rows(
                x_ptr, residual_ptr, None, row, k, rows, x_stride, residual_stride,
                D, BLOCK, TOTAL_DTYPE, KEEP,
            )  # fmt: skip
        weight = None
        if weight_ptr is not None:
            if CHUNKS > 1:
                gain = load_gain(weight_ptr, k, D, BLOCK)
            weight = widen(gain)
        y, absmax = norm_rows(x, rho, weight, EXACT, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE)
        store_cast(
            y, absmax, tensor_scale, values_ptr, scales_ptr, dequantized_ptr, row, k, rows, D,
            BLOCK, MODE, ELEM_DTYPE, BITS, MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA, CONVERTS,
            BLOCKED_SCALES,
        )  # fmt: skip


@triton.jit
def norm_rows(
    x,
    rho,
    weight,
    EXACT: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
):
    """Rows x [ROWS, K, B] with inverse RMS rho, normalised, and the bits of their absmaxes."""
    rho = rho[:, None]
    if EXACT:
        y = normalize(x, rho[:, :, None], weight, NORM_DTYPE, PRODUCT_DTYPE, OUT_DTYPE)
        absmax = absmax_bits(y, 2)
    elif weight is None:
        y = x * rho[:, :, None]
        # |x| rho is monotonic in |x|: the blocks' maxima are at hand.
        absmax = absmax_bits(x, 2).to(tl.float32, bitcast=True) * rho
        absmax = absmax.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        y = x * rho[:, :, None] * weight
        absmax = absmax_bits(y, 2)
    return y, absmax


@triton.jit
def store_cast(
    y, absmax, tensor_scale, values_ptr, scales_ptr, dequantized_ptr, row, k, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, ELEM_DTYPE: tl.constexpr,
    BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    MAX_MANTISSA: tl.constexpr, CONVERTS: tl.constexpr, BLOCKED_SCALES: tl.constexpr,
):  # fmt: skip
    """Cast a tile whose blocks' absmaxes have the bits ``absmax``, where there is a pointer."""
    scale, factor = scale_blocks(
        absmax, tensor_scale, MODE, MAX_EXPONENT, MANTISSA_BITS, MAX_MANTISSA
    )
    LARGEST: tl.constexpr = (1 + MAX_MANTISSA / 8388608) * (1 << MAX_EXPONENT)
    if values_ptr is not None:
        values = to_elements(y, factor, MODE, ELEM_DTYPE, BITS, MANTISSA_BITS, LARGEST, CONVERTS)
        if BITS == 4:
            store_words(values_ptr, values, row, k, rows, D, BLOCK)
        else:
            store_rows(values_ptr, values, row, k, rows, D, BLOCK)
    if scales_ptr is not None:
        store_scales(scales_ptr, scale, row, k, rows, D // BLOCK, BLOCKED_SCALES)
    if dequantized_ptr is not None:
        dtype: tl.constexpr = dequantized_ptr.dtype.element_ty
        restored = dequantize(
            y, factor, scale, tensor_scale, dtype, MODE, ELEM_DTYPE, BITS, MANTISSA_BITS, LARGEST
        )
        store_rows(dequantized_ptr, restored, row, k, rows, D, BLOCK)


@triton.jit
def load_rows(
    x_ptr,
    residual_ptr,
    total_ptr,
    row,
    k,
    rows,
    x_stride,
    residual_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TOTAL_DTYPE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Tile [ROWS, K, B] in float32, zero outside; with a residual the rounded sum, stored once."""
    column = k[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None, None] < rows) & (column[None, :, :] < D)
    x_at = x_ptr + row[:, None, None] * x_stride + column[None, :, :]
    x = widen(tl.load(x_at, mask=inside, other=0.0, eviction_policy=KEEP))
    if residual_ptr is not None:
        residual_at = residual_ptr + row[:, None, None] * residual_stride + column[None, :, :]
        total = narrow(x + widen(tl.load(residual_at, mask=inside, other=0.0)), TOTAL_DTYPE)
        if total_ptr is not None:
            tl.store(total_ptr + row[:, None, None] * D + column[None, :, :], total, mask=inside)
        x = widen(total)
    return x


@triton.jit
def load_gain(weight_ptr, k, D: tl.constexpr, BLOCK: tl.constexpr):
    """[1, K, B], as it is stored."""
    # Three dimensions, so that it is laid out over the threads as a row is.
    column = (k[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])[None, :, :]
    return tl.load(weight_ptr + column, mask=column < D, other=0.0, eviction_policy="evict_last")


@triton.jit
def store_rows(ptr, tile, row, k, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    column = k[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None, None] < rows) & (column[None, :, :] < D)
    tl.store(ptr + row[:, None, None] * D + column[None, :, :], tile, mask=inside)


@triton.jit
def store_words(ptr, words, row, k, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of 4 bits, eight in a word."""
    column = k[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    lay_out_as_bytes(ptr, row[:, None, None] * D + column[None, :, :], rows < 0)
    column = k[:, None] * (BLOCK // 8) + words_of(BLOCK)[None, :]
    inside = (row[:, None, None] < rows) & (column[None, :, :] < D // 8)
    at = ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.store(at + row[:, None, None] * (D // 8) + column[None, :, :], words, mask=inside)


@triton.jit
def store_scales(ptr, scale, row, k, rows, K: tl.constexpr, BLOCKED: tl.constexpr):
    """Scale bytes; the blocked layout is padded with zeros to 128 rows and 4 blocks."""
    inside = (row[:, None] < rows) & (k[None, :] < K)
    if BLOCKED:
        across: tl.constexpr = (K + 3) // 4
        padded = (row[:, None] < (rows + 127) // 128 * 128) & (k[None, :] < 4 * across)
        scale = tl.where(inside, scale, 0)
        at = blocked_scale_offset(row[:, None], k[None, :], across)
        tl.store(ptr + at, scale.to(tl.uint8), mask=padded)
    else:
        # Blocks of 16 are a thread's own: as if their scales were not next to each other, which
        # would have them exchanged, through shared memory, for wider stores.
        at = tl.max_contiguous(row[:, None] * K + k[None, :], (1, 1))
        tl.store(ptr + at, scale.to(tl.uint8), mask=inside)


def norm_cast(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    spec: NormCastSpec,
    *,
    tensor_scale: Tensor | None = None,
    residual: Tensor | None = None,
    dequantize: torch.dtype | None = None,
    config: RowTiling | None = None,
) -> tuple[Tensor, ...]:
    """``functional.mxnorm_cast`` as one kernel.

    Args:
        x: [..., D], D divisible by the block size; float32, bfloat16 or float16.
        tensor_scale: of NVFP4; positive, and large enough that its inverse is finite.
        residual: of x's shape; it is added to x before the norm.
        dequantize: return values * scales in this dtype in the place of values and scales.

    Returns:
        total where there is a residual; values and scales, or what they make dequantised; rho.
    """
    width = x.shape[-1]
    config = config or row_config(width, spec.format.element.bits)
    rows = Rows.of(x, weight, block_weights, tensor_scale, spec, residual, dequantize)
    padded = (rows.count + 127) // 128 * 128 if spec.scale_layout == "blocked" else rows.count
    launch.launcher(norm_cast_kernel)[((padded + config.rows - 1) // config.rows,)](
        *rows.pointers,
        rows.count,
        *rows.strides,
        **rows.constants,
        ROWS=config.rows,
        TILE_K=tile_blocks(width, spec, config),
        CHUNKS=config.chunks,
        num_warps=config.warps,
    )
    return rows.results
