"""Trace torchao's Blackwell (sm100) path without a GPU: fake CUDA tensors on any build of torch."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension
from torchao.prototype.mx_formats import inference_workflow, mx_tensor
from torchao.prototype.mx_formats.utils import from_blocked

from mxnorm_pass import functional
from mxnorm_pass.functional import block_format
from mxnorm_pass.numerics.e8m0 import round_up_to_e8m0

aten = torch.ops.aten

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
    with believed_sm100(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@contextlib.contextmanager
def believed_sm100() -> Iterator[None]:
    """torchao believes in an sm100 chip; its matmuls run on a CPU."""
    with contextlib.ExitStack() as stack:
        for module in (mx_tensor, inference_workflow):
            stack.enter_context(mock.patch.object(module, "is_sm_at_least_100", lambda: True))
        stack.enter_context(warnings.catch_warnings())
        # PyTorch's kernels for CPUs know none of the formats.
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name, kernel in (("_scaled_mm", scaled_mm), ("_scaled_mm_v2", scaled_mm_v2)):
            library.impl(name, kernel, "CPU", allow_override=True)
        yield


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


class Emulated(fx.Interpreter):
    """A CUDA graph on CPU tensors: known PTX and ``_scaled_mm`` are emulated."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
        if "asm_str" in kwargs:
            return round_up_to_e8m0(args[0]).to(torch.uint16)
        if target is aten._scaled_mm.default:
            return scaled_mm(*args)
        if target is aten._scaled_mm_v2.default:
            return scaled_mm_v2(*args)
        return super().call_function(target, args, kwargs)


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *_: Any, **__: Any) -> Tensor:
    """``aten._scaled_mm`` of blocked scales, without a bias, in bfloat16."""
    return dequantized(a, scale_a) @ dequantized(b.t(), scale_b).t()


def scaled_mm_v2(
    a: Tensor,
    b: Tensor,
    scales_a: Sequence[Tensor],
    _: Any,
    __: Any,
    scales_b: Sequence[Tensor],
    *___: Any,
) -> Tensor:
    """``aten._scaled_mm_v2`` of blocked scales, which those of the tensors may follow."""
    (scale_a, *of_a), (scale_b, *of_b) = scales_a, scales_b
    result = dequantized(a, scale_a) @ dequantized(b.t(), scale_b).t()
    for scale in (*of_a, *of_b):
        result = result * scale.to(result.dtype)
    return result


def dequantized(values: Tensor, blocked: Tensor) -> Tensor:
    """What a matmul makes of values and blocked scales: MXFP8, MXFP4 or NVFP4, which both say."""
    fmt = block_format("mxfp8" if values.dtype == torch.float8_e4m3fn else "mxfp4")
    if blocked.dtype == torch.float8_e4m3fn:
        fmt = block_format("nvfp4")
    values = values.contiguous().view(fmt.elem_dtype)
    rows, columns = fmt.scales_shape(fmt.shape_of(values.shape))
    padded = 512 * -(-rows // 128) * -(-columns // 4)
    in_order = from_blocked(
        blocked.contiguous().view(torch.uint8).flatten()[:padded], rows, columns
    )
    scales = in_order.contiguous().view(fmt.scale_dtype)
    return functional.mx_dequantize(values, scales, torch.bfloat16, format=fmt)


def functional_graph(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    with torch.no_grad():
        aot_function(function, fw_compiler=keep)(*args)
    return graphs[0]
