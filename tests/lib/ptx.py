"""Compiles a kernel, just as its launcher would launch it, for a GPU that is not there."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mxnorm_pass.kernels import launch, rows

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """What a launcher handed to a kernel."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches that are noted down instead of made; tensors may be on the "meta" device."""
    launches: list[Launch] = []

    def launcher(kernel: Any) -> Any:
        names = kernel.arg_names

        def note(*args: Any, **keywords: Any) -> None:
            arguments = dict(zip(names, args, strict=False))
            arguments |= {n: keywords.pop(n) for n in names if n in keywords}
            assert arguments.keys() == set(names)
            launches.append(Launch(kernel, arguments, keywords))

        return mock.MagicMock(__getitem__=lambda self, grid: note)

    with mock.patch.object(launch, "launcher", launcher):
        yield launches


@dataclass(frozen=True)
class Compiled:
    """PTX of a kernel, and what ptxas says about the machine code that it makes of it."""

    ptx: str
    log: str

    @property
    def spilled_bytes(self) -> int:
        found = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", self.log)
        assert len(found) >= 3, self.log
        return sum(map(int, found))

    @property
    def load_bits(self) -> list[int]:
        """Width of every load from global memory."""
        return self._bits_of("ld")

    @property
    def store_bits(self) -> list[int]:
        """Width of every store to global memory."""
        return self._bits_of("st")

    def _bits_of(self, access: str) -> list[int]:
        found = re.findall(rf"{access}\.global(\S*)\s", self.ptx)
        assert found
        return [_bits(instruction) for instruction in found]


def _bits(instruction: str) -> int:
    count = re.search(r"\.v(\d)", instruction)
    size = re.search(r"\.[bufs](\d+)$", instruction)
    assert size is not None, instruction
    return (int(count[1]) if count else 1) * int(size[1])


def compiled(call: Callable[[], Any], capability: int) -> Compiled:
    """The one kernel that ``call`` launches, for compute capability ``capability`` / 10."""
    converts = mock.patch.object(rows, "converts", lambda device: capability >= 100)
    with converts, recorded_launches() as launches:
        call()
    (launched,) = launches
    names = launched.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        argument = launched.arguments[name]
        is_constant = launched.kernel.params[i].is_constexpr or argument is None
        if is_constant:
            signature[name], constants[(i,)] = "constexpr", argument
        elif isinstance(argument, Tensor):
            signature[name], attributes[(i,)] = _POINTERS[argument.dtype], _DIVISIBLE
        else:
            signature[name] = "i32"
            if argument % 16 == 0:
                attributes[(i,)] = _DIVISIBLE
    make_source = GluonASTSource if launched.kernel.is_gluon() else ASTSource
    source = make_source(launched.kernel, signature, constants, attributes)
    log = io.StringIO()
    environment = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    with mock.patch.dict(os.environ, environment), redirect_stdout(log):
        result = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=launched.options
        )
    return Compiled(result.asm["ptx"], log.getvalue())


_DIVISIBLE = [["tt.divisibility", 16]]
