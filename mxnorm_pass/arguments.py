"""Checks of what the ops are given; every error names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from mxnorm_pass.spec import NormCastSpec

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(name: str, x: Tensor) -> None:
    """High-precision rows: [..., D], dense.

    Raises:
        TypeError: wrong dtype or layout.
        ValueError: no last dimension.
    """
    if x.dtype not in _FLOATS:
        allowed = ", ".join(map(str, _FLOATS))
        raise TypeError(f"{name} has dtype {x.dtype}; allowed: {allowed}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; it must be dense (torch.strided)")
    if x.ndim == 0:
        raise ValueError(f"{name} is a scalar; it must be [..., D]")


def check_blocks(name: str, x: Tensor, block_size: int) -> None:
    """Raises a ValueError unless the last dimension is whole blocks."""
    if block_size < 1 or x.shape[-1] % block_size != 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, whose last dimension is not divisible by "
            f"block_size {block_size}"
        )


def check_norm_cast(
    x: Tensor,
    weight: Tensor | None,
    block_weights: Tensor | None,
    spec: NormCastSpec,
    residual: Tensor | None = None,
) -> None:
    """Arguments of ``norm_cast`` and its kin.

    Raises:
        TypeError: a wrong dtype or layout.
        ValueError: a wrong shape or device.
    """
    check_rows("x", x)
    check_blocks("x", x, spec.block_size)
    if residual is not None:
        check_rows("residual", residual)
        _check_like("residual", residual, x, tuple(x.shape))
    if weight is not None:
        if not weight.dtype.is_floating_point:
            raise TypeError(f"weight has dtype {weight.dtype}; it must be floating point")
        _check_like("weight", weight, x, (x.shape[-1],))
    if block_weights is not None:
        if block_weights.dtype != torch.float32:
            raise TypeError(f"block_weights has dtype {block_weights.dtype}, not torch.float32")
        _check_like("block_weights", block_weights, x, (x.shape[-1] // spec.block_size,))


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; for x of shape {tuple(x.shape)} it must be "
            f"{shape}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must be on one")


def check_quantized(values: Tensor, scales: Tensor) -> None:
    """Arguments of ``dequantize``.

    Raises:
        TypeError: ``values`` is no float8 tensor or ``scales`` no E8M0 tensor.
        ValueError: their shapes do not belong together, or their devices differ.
    """
    if values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise TypeError(
            f"values has dtype {values.dtype}; allowed: torch.float8_e4m3fn, torch.float8_e5m2"
        )
    if scales.dtype != torch.float8_e8m0fnu:
        raise TypeError(f"scales has dtype {scales.dtype}; it must be torch.float8_e8m0fnu")
    if (
        values.shape[:-1] != scales.shape[:-1]
        or scales.shape[-1] == 0
        or values.shape[-1] % scales.shape[-1] != 0
    ):
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}; values of shape {tuple(values.shape)} need "
            "[..., D / block size]"
        )
    if values.device != scales.device:
        raise ValueError(f"scales is on {scales.device}, values on {values.device}")
