"""What the kernels do not do. Needs no Triton, so that it can say that Triton is missing."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.cast import Quantized
from mxnorm_pass.numerics.formats import MX_BLOCK_SIZE, NEAREST, SCALE_MODES
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
# The only one whose products of float8 are made in float16, and summed in float32.
MX_LINEAR_CAPABILITY = (9, 0)
# Beyond, a matmul in high precision of what is widened first is faster.
MAX_LINEAR_ROWS = 32
# In which kernels read values and scales.
MX_LINEAR_WORDS = torch.int32
_LINEAR_DTYPES = (torch.bfloat16, torch.float32)
_LINEAR_WIDTH = MX_BLOCK_SIZE * MX_LINEAR_WORDS.itemsize


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
    x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype, rows: int
) -> str | None:
    """The same for the kernel that multiplies few rows by a weight.

    Args:
        rows: of x.
        dtype: of the result.
    """
    others = (x.scales, weight.values, weight.scales, bias)
    reason = _uncovered_device(x.values, *others)
    if reason is not None:
        return reason
    if capability(x.values.device) != MX_LINEAR_CAPABILITY:
        return f"compute capability {capability(x.values.device)}; it is for {MX_LINEAR_CAPABILITY}"
    if dtype not in _LINEAR_DTYPES:
        return f"{dtype} is none of {', '.join(map(str, _LINEAR_DTYPES))}"
    for operand in (x, weight):
        reason = _uncovered_operand(operand)
        if reason is not None:
            return reason
    if rows == 0:
        return "there are no rows"
    if rows > MAX_LINEAR_ROWS:
        return f"{rows} rows; the kernel is for up to {MAX_LINEAR_ROWS}"
    return None


def _uncovered_operand(operand: Quantized) -> str | None:
    fmt, values, scales = operand.format, operand.values, operand.scales
    is_mxfp8 = fmt.elem_dtype is torch.float8_e4m3fn and fmt.has_e8m0_scales
    if not is_mxfp8 or fmt.block_size != MX_BLOCK_SIZE:
        return f"{fmt.name}; the kernel knows MXFP8 e4m3 in blocks of {MX_BLOCK_SIZE}"
    if not values.is_contiguous():
        return "the values are not contiguous"
    if values.storage_offset() % MX_LINEAR_WORDS.itemsize:
        return "the values do not start at a word"
    # Those that are not contiguous are copied.
    if scales.is_contiguous() and scales.storage_offset() % MX_LINEAR_WORDS.itemsize:
        return "the scales do not start at a word"
    if values.shape[-1] % _LINEAR_WIDTH:
        return f"rows of {values.shape[-1]} elements, which {_LINEAR_WIDTH} does not divide"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
