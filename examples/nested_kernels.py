"""Write down the kernels of ``bench_nested.py``, for a torch whose Inductor cannot make them.

    python examples/nested_kernels.py  # torch 2.13 or 2.14; needs no GPU

Inductor's lowering, scheduling and code generation run for an H100 that is not there, on the graph
of each function of ``bench_nested.py``; what has to ask the GPU is answered here. Nothing is
compiled or run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import triton
from bench_nested import KERNELS, OPTIONS, WHOLE_ROWS, Function, NestedKernel, has_option
from benchlib import save_json
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import metrics
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from mxnorm_pass import functional

VARIANTS = ("norm", "residual")
# Variant, format, width, and whether the kernel is for whole multiples of WHOLE_ROWS rows.
WANTED = [
    *product(VARIANTS, ("mxfp8",), (2048, 4096, 5120, 8192, 16384), (True, False)),
    *product(VARIANTS, ("mxfp4", "nvfp4"), (2048, 4096, 8192, 16384), (True,)),
]
# Fewer rows than WHOLE_ROWS get a mask; enough of them that no row is split over programs.
MASKED_ROWS = 1024


class NotNested(Exception):
    """Inductor made no single kernel of it."""


class AbsentDriver:
    """Triton's driver of a GPU that is not there."""

    binary_ext = "cubin"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


H100 = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}


@contextmanager
def absent_h100() -> Iterator[None]:
    """Inductor finds an H100 and a Triton for it."""
    properties = DeviceProperties(type="cuda", index=0, cc=90, **H100)
    of_torch = mock.Mock(minor=0, total_memory=80 * 2**30, gcnArchName="", **H100)
    answers: dict[str, Any] = {
        "torch.cuda.is_available": True,
        "torch.cuda.device_count": 1,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_properties": of_torch,
        "torch.cuda._lazy_init": None,
        "torch._utils_internal.max_clock_rate": 1980,
        "torch._inductor.scheduler.has_triton": True,
    }
    interface = {
        "is_available": lambda: True,
        "raise_if_triton_unavailable": lambda *_: None,
        "get_compute_capability": lambda *_: 90,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, return_value=answer))
        for name, function in interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(function)))
        create = classmethod(lambda *_: properties)
        stack.enter_context(mock.patch.object(DeviceProperties, "create", create))
        driver = type(triton.runtime.driver)
        stack.enter_context(mock.patch.object(driver, "active", AbsentDriver()))
        yield


def fake_inputs(function: Function, tokens: int, width: int) -> dict[str, Tensor]:
    """What the function reads; inside a FakeTensorMode."""
    dtype, elements = (torch.int32, width // 2) if function.reads_pairs else (torch.bfloat16, width)
    shapes = {"weight": (elements,), "tensor_scale": ()}
    return {
        name: torch.empty(
            shapes.get(name, (tokens, elements)),
            dtype=torch.float32 if name == "tensor_scale" else dtype,
            device="cuda",
        )
        for name in function.inputs
    }


@torch.no_grad()
def inductor_code(function: Function, tokens: int, width: int) -> str:
    """The Python module that Inductor writes for the function.

    Raises:
        NotNested: it has several kernels, or one that is no nested reduction.
    """
    metrics.reset()
    options = {**OPTIONS, "compile_threads": 1, "fx_graph_cache": False}
    with absent_h100(), torch._inductor.config.patch(options), FakeTensorMode() as fake:
        tensors = fake_inputs(function, tokens, width)
        arguments = list(tensors.values())

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            return function(dict(zip(tensors, values, strict=True)))

        # As AOTAutograd would: in-place ops, which torchao's casts have, are gone.
        functional_run = torch.func.functionalize(run)
        traced = make_fx(functional_run, decomposition_table=select_decomp_table())(*arguments)
        with V.set_fake_mode(fake):
            graph = GraphLowering(traced, shape_env=None, is_inference=True)
            with (
                V.set_debug_handler(DebugContext()),
                V.set_graph_handler(graph),
                V.set_extern_kernel_nodes([]),
            ):
                graph.run(*arguments)
                code: str = graph.codegen()[0].value
    kernels = code.count("@triton.jit")
    if kernels != 1 or metrics.codegen_nested_reduction != 1:
        nested = metrics.codegen_nested_reduction
        raise NotNested(f"{kernels} kernels, {nested} of them nested")
    return code


def generate(variant: str, format: str, width: int, whole_rows: bool) -> NestedKernel:
    function = Function(variant == "residual", functional.block_format(format))
    code = inductor_code(function, WHOLE_ROWS if whole_rows else MASKED_ROWS, width)
    return NestedKernel(
        variant, format, width, whole_rows, kernel_arguments(code, function), kernel_source(code)
    )


def kernel_arguments(code: str, function: Function) -> tuple[str, ...]:
    """Whose pointers the one launch in ``code`` hands over, in its order."""
    (inputs,) = re.findall(r"^        (.*?),? = args$", code, re.MULTILINE)
    (launch,) = re.findall(r"^            \w+\.run\((.*), stream=\w+\)$", code, re.MULTILINE)
    (returned,) = re.findall(r"^        return \((.*)\)$", code, re.MULTILINE)
    names = dict(zip(inputs.split(", "), function.inputs, strict=True))
    names |= dict(zip(re.findall(r"\bbuf\d+\b", returned), function.outputs, strict=True))
    *pointers, _, _ = launch.split(", ")
    return tuple(names[pointer] for pointer in pointers)


def kernel_source(code: str) -> tuple[str, ...]:
    """Lines of the Triton function, with the number of rows an argument."""
    (source,) = re.findall(r"^@triton\.jit\n.*?(?=^''')", code, re.MULTILINE | re.DOTALL)
    lines = source.rstrip().splitlines()
    return tuple(line for line in lines if not re.fullmatch(r"    xnumel = \d+", line))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=KERNELS)
    args = parser.parse_args(argv)
    if not has_option():
        print(f"torch {torch.__version__} has no triton.nested_reduction", file=sys.stderr)
        return 2
    kernels = [asdict(generate(*names)) for names in WANTED]
    content = {"torch": torch.__version__, "triton": triton.__version__, "kernels": kernels}
    save_json(args.json, content)
    print(f"{len(kernels)} kernels in {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
