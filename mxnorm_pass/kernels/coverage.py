"""What the kernels do not do. Needs no Triton, so that it can say that Triton is missing."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.formats import MX_BLOCK_SIZE, NEAREST, SCALE_MODES, BlockFormat
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.norm_cast import NormCastSpec

MAX_WIDTH = 65536
# The constant's p-th power must stay in float32's range.
MAX_P = 16.0
MAX_HADAMARD = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_SIZES = (16, 32, 64, 128)
# Ada and Hopper are the first chips that convert to float8.
_MIN_CAPABILITY = (8, 9)
# From here on matmuls read values and scales themselves.
MATMUL_CAPABILITY = (10, 0)
MAX_LINEAR_ROWS = 64
_LINEAR_ELEMENTS = ("e4m3fn", "e5m2", "e2m1")
_LINEAR_WIDTH = 128


def uncovered(x: Tensor, spec: NormCastSpec, *others: Tensor | None) -> str | None:
    """Why no kernel can do this; None if one can.

    Args:
        x: [..., D], real or fake.
        others: what else the kernel would read.
    """
    reason = _uncovered_device(x, *others)
    if reason is not None:
        return reason
    dtypes = [tensor.dtype for tensor in (x, *others) if tensor is not None]
    for dtype in (*dtypes, spec.norm_dtype or torch.float32, spec.out_dtype):
        if dtype not in DTYPES:
            return f"{dtype} is none of {', '.join(map(str, DTYPES))}"
    width = x.shape[-1]
    if not isinstance(width, int) or width > MAX_WIDTH:
        return f"rows of {width} elements; a kernel takes at most {MAX_WIDTH}"
    fmt = spec.format
    if fmt.block_size not in _BLOCK_SIZES:
        return f"block size {fmt.block_size}; the kernels know {_BLOCK_SIZES}"
    if fmt.scale_mode not in (*SCALE_MODES, NEAREST):
        return f"scale mode {fmt.scale_mode!r}; the kernels know {', '.join(SCALE_MODES)}"
    if spec.estimator == "mxnorm" and spec.p > MAX_P:
        return f"p = {spec.p}; the kernels take p up to {MAX_P}"
    return _no_elements(x)


def _uncovered_device(x: Tensor, *others: Tensor | None) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; the kernels run on CUDA devices"
    if find_spec("triton") is None:
        return "triton is not installed"
    if capability(x.device) < _MIN_CAPABILITY:
        return f"compute capability {capability(x.device)} has no float8; {_MIN_CAPABILITY} has"
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            return f"x is on {x.device}, another tensor on {tensor.device}"
    return None


def _no_elements(x: Tensor) -> str | None:
    return "there are no rows" if isinstance(x.numel(), int) and x.numel() == 0 else None


def uncovered_both(
    x: Tensor, spec: NormCastSpec, along_t: OperandRead | None, *others: Tensor | None
) -> str | None:
    """The same for the kernel that casts in both directions.

    Args:
        along_t: the cast along T, where it is not that along D.
    """
    rows, sizes = math.prod(x.shape[:-1]), [spec.format.block_size]
    if along_t is not None:
        reason = uncovered_operand(x, along_t.operand, along_t.seed)
        if reason is not None:
            return reason
        sizes += [along_t.operand.cast.block_size, max(1, along_t.hadamard_size)]
    for size in sizes:
        if rows % size != 0:
            return f"{rows} rows, which {size} does not divide"
    return uncovered(x, spec, *others)


def uncovered_operand(x: Tensor, operand: Operand, *others: Tensor | None) -> str | None:
    """The same for the kernel that casts operands.

    Args:
        x: [R, C].
        others: seed and tensor scale.
    """
    fmt, hadamard = operand.cast.format, operand.hadamard
    if fmt is None:
        return "the operand has no format"
    if fmt.scale_mode not in (*SCALE_MODES, NEAREST) or fmt.block_size not in _BLOCK_SIZES:
        return f"{fmt.name}; the kernels know blocks of {_BLOCK_SIZES}"
    if hadamard is not None and hadamard.size > MAX_HADAMARD:
        return f"a Hadamard transform of {hadamard.size}; a kernel takes at most {MAX_HADAMARD}"
    return _uncovered_device(x, *others) or _no_elements(x)


def uncovered_mx_linear(
    x_rows: int,
    x_dtype: torch.dtype,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    fmt: BlockFormat,
) -> str | None:
    """The same for the kernel that multiplies few rows by a weight in a block format.

    Args:
        weight: [N, K], or [N, K / 2] where two elements share a byte.
        scales: [N, K / 32], which are copied where they are not contiguous.
    """
    reason = _uncovered_device(weight, scales, bias)
    if reason is not None:
        return reason
    if capability(weight.device) >= MATMUL_CAPABILITY:
        return f"compute capability {capability(weight.device)} multiplies MX operands by itself"
    if x_dtype != torch.bfloat16:
        return f"{x_dtype}; the kernel multiplies in bfloat16"
    known = fmt.has_e8m0_scales and fmt.element.name in _LINEAR_ELEMENTS
    if not known or fmt.block_size != MX_BLOCK_SIZE:
        return f"{fmt.name}; the kernel knows MXFP8 and MXFP4 in blocks of {MX_BLOCK_SIZE}"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    width = fmt.shape_of(weight.shape)[-1]
    if width % _LINEAR_WIDTH:
        return f"rows of {width} elements, which {_LINEAR_WIDTH} does not divide"
    if x_rows > MAX_LINEAR_ROWS:
        return f"{x_rows} rows; from {MAX_LINEAR_ROWS + 1} on a widened weight is faster"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
