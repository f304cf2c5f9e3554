"""Trace torchao's Blackwell (sm100) path without a GPU: fake CUDA tensors on any build of torch."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension
from torchao.prototype.mx_formats import inference_workflow, mx_tensor

# Views and autograd ask for the device guard of a tensor's device. FakeTensorMode installs one
# that does nothing where a CUDA build finds no GPU; a CPU build has none at all.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
extern "C" void install() {
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  if (!slot.load()) slot.store(&guard);
}
"""


@lru_cache(maxsize=1)
def _install_device_guard() -> None:
    if torch.backends.cuda.is_built():
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        links = [f"-L{path}" for path in cpp_extension.library_paths()]
        command = ["g++", "-shared", "-fPIC", "-std=c++20", source, "-o", library]
        subprocess.run([*command, *includes, *links, "-lc10"], check=True)
        ctypes.CDLL(str(library)).install()


@contextlib.contextmanager
def sm100() -> Iterator[FakeTensorMode]:
    """torchao believes in an sm100 chip, and tensors are fake, also on "cuda"."""
    _install_device_guard()
    with contextlib.ExitStack() as stack:
        for module in (mx_tensor, inference_workflow):
            stack.enter_context(mock.patch.object(module, "is_sm_at_least_100", lambda: True))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def to_fake_cuda(module: nn.Module) -> nn.Module:
    """The module with parameters and buffers without content on "cuda"; inside :func:`sm100`."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(_fake(parameter), parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = _fake(buffer)
    return module


def _fake(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
