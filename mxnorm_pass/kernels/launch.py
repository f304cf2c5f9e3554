"""Launch a kernel. Under a tracer a launch becomes one graph node."""

from __future__ import annotations

from typing import Any

import torch
import triton


def launcher(kernel: Any) -> Any:
    """``kernel`` to be called as ``[grid](...)``: under a tracer it becomes one graph node."""
    if isinstance(kernel, triton.JITFunction):
        return torch.library.wrap_triton(kernel)
    return kernel
