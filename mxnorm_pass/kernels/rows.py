"""Kernels over rows: what they read and write, how they cut their work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxnorm_pass.kernels import coverage
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.layout import blocked_scales_shape
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.rms import rms_constant

TRITON_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.uint8: tl.uint8,
}

# Blackwell.
_CONVERTS_FROM = (10, 0)


@dataclass(frozen=True)
class RowTiling:
    """How a row kernel cuts its work.

    Attributes:
        rows: rows per program.
        chunks: pieces of a row that are swept one after another; 1 holds it in registers.
        warps: warps per program.
    """

    rows: int
    chunks: int
    warps: int


_ROW_IN_REGISTERS = 16384
_NARROW = 2048


def row_config(width: int, bits: int = 8) -> RowTiling:
    """For rows of ``width`` elements of ``bits`` bits, whatever their number."""
    padded: int = triton.next_power_of_2(width)
    chunks = max(1, padded // _ROW_IN_REGISTERS)
    rows = max(1, _NARROW // padded)
    # 32 to 64 elements per thread keep enough loads in flight, with few warps to wait for. What a
    # thread does but once weighs more where no hardware converts.
    warps = 8 if width >= (8192 if bits == 8 else 16384) else 4
    return RowTiling(rows, chunks, warps)


@dataclass(frozen=True)
class Rows:
    """What a kernel reads and writes along D.

    Attributes:
        pointers: x, residual, weight, block weights, tensor scale, total, values, scales (bytes),
            rho, dequantised rows; None where there is no such input or nobody wants the result.
        scale_dtype: of what the bytes of scales are.
        strides: between rows of x and of the residual.
        constants: what the kernel is specialised on.
    """

    pointers: tuple[Tensor | None, ...]
    count: int
    strides: tuple[int, int]
    scale_dtype: torch.dtype
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor | None,
        block_weights: Tensor | None,
        tensor_scale: Tensor | None,
        spec: NormCastSpec,
        residual: Tensor | None,
        dequantize: torch.dtype | None,
    ) -> Rows:
        """Results are allocated, uninitialised."""
        x_rows = as_rows(x)
        residual_rows = None if residual is None else as_rows(residual)
        total = values = scales = dequantized = None
        if residual is not None:
            total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
        if dequantize is not None:
            dequantized = x.new_empty(x.shape, dtype=dequantize)
        else:
            fmt = spec.format
            values = x.new_empty(fmt.values_shape(x.shape), dtype=fmt.elem_dtype)
            scales = x.new_empty(scales_shape(x, spec), dtype=torch.uint8)
        rho = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        weight = None if weight is None else weight.contiguous()
        block_weights = None if block_weights is None else block_weights.contiguous()
        inputs = (x_rows, residual_rows, weight, block_weights, tensor_scale)
        summed = x.dtype if total is None else total.dtype
        return cls(
            pointers=(*inputs, total, values, scales, rho, dequantized),
            count=x_rows.shape[0],
            strides=(x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0)),
            scale_dtype=spec.format.scale_dtype,
            constants=constants(spec, x, weight, block_weights, summed),
        )

    @property
    def results(self) -> tuple[Tensor, ...]:
        """Total; values and scales, or dequantised rows; rho."""
        total, values, scales, rho, dequantized = self.pointers[5:]
        if scales is not None:
            scales = scales.view(self.scale_dtype)
        return tuple(t for t in (total, values, scales, dequantized, rho) if t is not None)


def tile_blocks(width: int, spec: NormCastSpec, config: RowTiling) -> int:
    blocks: int = triton.next_power_of_2(width // spec.format.block_size) // config.chunks
    # The blocked layout is padded to 4 blocks.
    return max(blocks, 4) if spec.scale_layout == "blocked" else blocks


def as_rows(x: Tensor) -> Tensor:
    """[..., D] as [T, D] whose rows are contiguous; a copy only where strides ask for one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def converts(device: torch.device) -> bool:
    """Does the hardware convert to elements of 6 and 4 bits?"""
    return device.type == "cuda" and coverage.capability(device) >= _CONVERTS_FROM


def scales_shape(x: Tensor, spec: NormCastSpec) -> tuple[int, ...]:
    shape = spec.format.scales_shape(x.shape)
    return blocked_scales_shape(shape) if spec.scale_layout == "blocked" else shape


def statistic_factors(
    spec: NormCastSpec, width: int, block_weights: Tensor | None
) -> tuple[float, float]:
    """``FACTOR`` and ``SCALE`` of ``mean_square.inverse_rms``."""
    if spec.estimator == "exact":
        return 1.0 / width, 1.0
    if block_weights is not None:
        return 1.0, 1.0
    blocks = width // spec.format.block_size
    c = rms_constant(spec.p, spec.format.block_size)
    if spec.p in (1, 2):
        return 1.0 / (blocks * c**spec.p), 1.0
    return 1.0 / blocks, 1.0 / c


def element_constants(fmt: BlockFormat, device: torch.device) -> dict[str, Any]:
    """What a cast is specialised on."""
    elem = fmt.element
    return {
        "MODE": fmt.scale_mode,
        "ELEM_DTYPE": TRITON_DTYPES[elem.dtype],
        "BITS": elem.bits,
        "MAX_EXPONENT": elem.max_exponent,
        "MANTISSA_BITS": elem.mantissa_bits,
        "MAX_MANTISSA": elem.max_mantissa,
        "CONVERTS": elem.bits < 8 and converts(device),
    }


def constants(
    spec: NormCastSpec,
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    total_dtype: torch.dtype,
) -> dict[str, Any]:
    """What kernels of norms are specialised on."""
    norm_dtype = spec.norm_dtype or torch.float32
    product = norm_dtype if weight is None else torch.promote_types(norm_dtype, weight.dtype)
    exact = spec.estimator == "exact"
    factor, scale = statistic_factors(spec, x.shape[-1], block_weights)
    return {
        "D": x.shape[-1],
        "BLOCK": spec.format.block_size,
        "EXACT": exact,
        "P": 2.0 if exact else float(spec.p),
        "EPS": spec.eps,
        "FACTOR": factor,
        "SCALE": scale,
        **element_constants(spec.format, x.device),
        "NORM_DTYPE": TRITON_DTYPES[norm_dtype],
        "PRODUCT_DTYPE": TRITON_DTYPES[product],
        "OUT_DTYPE": TRITON_DTYPES[spec.out_dtype],
        "TOTAL_DTYPE": TRITON_DTYPES[total_dtype],
        "BLOCKED_SCALES": spec.scale_layout == "blocked",
    }
