"""What the kernels do not do. Needs no Triton, so that it can say that Triton is missing."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from mxnorm_pass.numerics.formats import NEAREST, SCALE_MODES
from mxnorm_pass.numerics.norm_cast import NormCastSpec

MAX_WIDTH = 65536
# The constant's p-th power must stay in float32's range.
MAX_P = 16.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_SIZES = (16, 32, 64, 128)
# Ada and Hopper are the first chips that convert to float8.
_MIN_CAPABILITY = (8, 9)


def uncovered(x: Tensor, spec: NormCastSpec, *others: Tensor | None) -> str | None:
    """Why no kernel can do this; None if one can.

    Args:
        x: [..., D], real or fake.
        others: what else the kernel would read.
    """
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; the kernels run on CUDA devices"
    if find_spec("triton") is None:
        return "triton is not installed"
    if capability(x.device) < _MIN_CAPABILITY:
        return f"compute capability {capability(x.device)} has no float8; {_MIN_CAPABILITY} has"
    tensors = [x, *(t for t in others if t is not None)]
    for tensor in tensors:
        if tensor.device != x.device:
            return f"x is on {x.device}, another tensor on {tensor.device}"
    dtypes = [tensor.dtype for tensor in tensors]
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
    if isinstance(x.numel(), int) and x.numel() == 0:
        return "there are no rows"
    return None


def uncovered_both(x: Tensor, spec: NormCastSpec, *others: Tensor | None) -> str | None:
    """The same for the kernel that casts in both directions."""
    rows, size = math.prod(x.shape[:-1]), spec.format.block_size
    if rows % size != 0:
        return f"{rows} rows, which {size} does not divide"
    return uncovered(x, spec, *others)


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
