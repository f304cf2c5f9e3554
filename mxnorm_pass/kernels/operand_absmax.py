"""The largest magnitude of a matrix, or of its transpose, behind a Hadamard transform.

NVFP4's tensor scale depends on all of what is cast, which nobody has yet where the cast transforms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import launch
from mxnorm_pass.kernels.device.hadamard import hadamard_matrix, transform
from mxnorm_pass.kernels.device.mx import absmax_bits
from mxnorm_pass.kernels.device.operand import plus
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.kernels.operands import key_halves
from mxnorm_pass.kernels.rows import as_rows
from mxnorm_pass.numerics.philox import matmul_number

_SIZE, _TILES, _WARPS = 128, 8, 8


@triton.jit
def operand_absmax_kernel(
    x_ptr, seed_ptr, absmax_ptr, rows, columns, x_stride, signs_low, signs_high,
    TRANSPOSED: tl.constexpr, G: tl.constexpr, SIGNS: tl.constexpr, MATMUL: tl.constexpr,
    S: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of ``TILES * S`` columns, tiles of S rows.

    Args:
        absmax_ptr: int32 zero, where the bits of a float32 are stored.
    """
    row = tl.program_id(1) * S
    seed = tl.zeros([], tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    of_signs = plus(seed, signs_low, signs_high)
    matrix = hadamard_matrix(of_signs, MATMUL, SIGNS, G, x_ptr.dtype.element_ty)
    r = (row + tl.arange(0, S))[:, None]
    largest = tl.zeros([S], tl.int32)
    for tile in range(TILES):
        c = ((tl.program_id(0) * TILES + tile) * S + tl.arange(0, S))[None, :]
        x = tl.load(x_ptr + r.to(tl.int64) * x_stride + c, (r < rows) & (c < columns), 0.0)
        if TRANSPOSED:
            x = tl.trans(x)
        largest = tl.maximum(largest, absmax_bits(transform(x, matrix, G**-0.5), 1))
    # Of numbers that are not negative bits order alike, and NaN is above infinity.
    tl.atomic_max(absmax_ptr, tl.max(largest, 0), sem="relaxed")


def operand_absmax(x: Tensor, transposed: bool, read: OperandRead) -> Tensor:
    """[1] float32, max |transform| of x [R, C] along C, or of its transpose along R."""
    x = as_rows(x)
    rows, columns = x.shape
    hadamard = read.operand.hadamard
    assert hadamard is not None
    absmax = x.new_zeros((1,), dtype=torch.int32)
    across = (columns + _SIZE * _TILES - 1) // (_SIZE * _TILES)
    launch.launcher(operand_absmax_kernel)[(across, (rows + _SIZE - 1) // _SIZE)](
        x,
        read.seed,
        absmax,
        rows,
        columns,
        x.stride(0),
        *key_halves(read)[2:],
        TRANSPOSED=transposed,
        G=hadamard.size,
        SIGNS=hadamard.signs,
        MATMUL=matmul_number(read.operand.matmul),
        S=_SIZE,
        TILES=_TILES,
        num_warps=_WARPS,
    )
    return absmax.view(torch.float32)
