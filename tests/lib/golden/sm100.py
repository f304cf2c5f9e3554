"""Make torchao take its path for sm100 GPUs on a machine without one; for tracing alone.

torchao decides what it registers when it is imported, so :func:`import_torchao` comes first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

_KERNELS = "torchao.prototype.mx_formats.kernels"
_IMPORTED = (
    ("torch.cuda.is_available", lambda: True),
    ("torch.cuda.get_device_capability", lambda *_: (10, 0)),
    ("torch.version.cuda", "13.0"),
    ("torch.utils._triton.has_triton", lambda *_: has_triton()),
)
_TRACED = (
    ("torchao.prototype.mx_formats.mx_tensor", "is_sm_at_least_100", lambda: True),
    (
        "torchao.prototype.moe_training.kernels.mxfp8.quant",
        "_mxfp8_cutedsl_kernels_available",
        True,
    ),
)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def import_torchao() -> None:
    """Import torchao so that it registers its kernels for sm100."""
    assert _KERNELS not in sys.modules, "torchao has already decided for the real machine"
    with ExitStack() as stack:
        for name, value in _IMPORTED:
            stack.enter_context(mock.patch(name, value))
        importlib.import_module(_KERNELS)


@contextmanager
def sm100() -> Iterator[None]:
    """Trace on the CPU what torchao would run on an sm100 GPU.

    Autograd and in-place indexing of fake CUDA tensors need a CUDA build, so the tensors are on
    the CPU and only say that they are not.
    """
    with ExitStack() as stack:
        mx_tensor = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
        if hasattr(mx_tensor, "is_sm_at_least_100"):
            stack.enter_context(mock.patch.object(mx_tensor, "is_sm_at_least_100", lambda: True))
        is_cuda = property(lambda _: True)
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", is_cuda, create=True))
        if has_triton():
            stack.enter_context(triton_target())
        yield


@contextmanager
def triton_target() -> Iterator[None]:
    """Let torch find out which arguments a Triton kernel writes, for which it is parsed."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 100, 32)
    stand_in = SimpleNamespace(get_current_target=lambda: target)
    with mock.patch.object(type(driver), "active", stand_in):
        yield
