"""Runs kernels in Gluon on a CPU, for which Triton has no interpreter.

A kernel's Python function is called with stand-ins for the language: values are tensors of torch,
layouts are dropped, as they change no value. Memory is stricter than a GPU's: reads and writes stay
inside of tensors, a copy lands only when it is waited for, and until then its place is poison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from triton.experimental.gluon import language
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mxnorm_pass.kernels.device import fragments

# All bits: in MXFP8 elements and scales are NaN.
_POISON = -1


class Value(Tensor):
    """A tensor as kernels have it: casts may keep the bits, and there is a layout, of no effect."""

    type = cast(Any, SimpleNamespace(layout=None))
    # Names are bound anew: what else holds the tensor keeps its value.
    __iadd__, __ior__ = Tensor.__add__, Tensor.__or__

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)


def _value(tensor: Tensor) -> Value:
    return tensor.as_subclass(Value)


@dataclass(frozen=True)
class Pointer:
    """To elements of a tensor that is contiguous."""

    to: Tensor
    offsets: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.to.dtype)

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.to, self.offsets + offsets)

    def inside(self, offsets: Tensor) -> Tensor:
        assert ((offsets >= 0) & (offsets < self.to.numel())).all(), "outside of the tensor"
        return offsets.long()

    def load(self) -> Value:
        return _value(self.to.view(-1)[self.inside(self.offsets)])

    def store(self, values: Tensor, mask: Tensor) -> None:
        assert values.dtype == self.to.dtype
        mask = mask.expand(values.shape)
        self.to.view(-1)[self.inside(self.offsets[mask])] = values[mask]


@dataclass(frozen=True)
class Shared:
    """Shared memory, or a part of it."""

    memory: Tensor

    @property
    def shape(self) -> list[int]:
        return list(self.memory.shape)

    def index(self, i: int) -> Shared:
        return Shared(self.memory[i])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.memory.permute(order))

    def load(self, layout: Any) -> Value:
        return _value(self.memory.clone())

    def poison(self) -> None:
        self.memory.fill_(_POISON)


class Copies:
    """Copies to shared memory that are under way, in groups."""

    def __init__(self) -> None:
        self._begun: list[Callable[[], Any]] = []
        self._groups: list[list[Callable[[], Any]]] = []

    def begin(self, shared: Shared, source: Pointer) -> None:
        shared.poison()
        words = source.load()
        assert list(words.shape) == shared.shape
        self._begun.append(lambda: shared.memory.copy_(words))

    def commit_group(self) -> None:
        self._groups.append(self._begun)
        self._begun = []

    def wait_group(self, outstanding: int) -> None:
        assert outstanding >= 0
        while len(self._groups) > outstanding:
            for land in self._groups.pop(0):
                land()


def _scalar(number: int) -> Value:
    return _value(torch.tensor(number, dtype=torch.int32))


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    shared = Shared(torch.empty(shape, dtype=dtype))
    shared.poison()
    return shared


def _e4m3_bytes_as_float16(words: Tensor) -> Any:
    codes = words.contiguous().view(torch.float8_e4m3fn).reshape(*words.shape, 4)
    return codes.to(torch.float16).unbind(-1)


_LANGUAGE: dict[str, Any] = {
    **{name: getattr(torch, name) for name in ("float16", "float32", "int32", "int64")},
    **dict.fromkeys(("NVMMADistributedLayout", "BlockedLayout"), lambda *args: None),
    **dict.fromkeys(("SliceLayout", "DotOperandLayout"), lambda *args: None),
    "SwizzledSharedLayout": lambda *args: None,
    "convert_layout": lambda x, layout, assert_trivial: x,
    "static_range": range,
    "arange": lambda start, end, layout: _value(torch.arange(start, end, dtype=torch.int32)),
    "zeros": lambda shape, dtype, layout: _value(torch.zeros(shape, dtype=dtype)),
    "allocate_shared_memory": _allocate,
    "load": Pointer.load,
    "store": Pointer.store,
    "cdiv": lambda a, b: (a + b - 1) // b,
    "minimum": lambda a, b: torch.clamp(a, max=b),
    "maximum": lambda a, b: torch.clamp(a, min=b),
    "where": torch.where,
    "sum": torch.sum,
    "permute": torch.permute,
    "expand_dims": torch.unsqueeze,
    "join": lambda a, b: torch.stack((a, b), -1),
    "split": lambda x: x.unbind(-1),
}


class Program:
    """One program of a grid, and what its functions find in the place of the language."""

    def __init__(self, index: int) -> None:
        copies = Copies()
        program_id = {"program_id": lambda axis: _scalar(index)}
        self._modules = [
            (language, SimpleNamespace(**_LANGUAGE, **program_id)),
            (async_copy, copies),
        ]
        self._builtins = {
            "async_load": copies.begin,
            "async_copy_global_to_shared": copies.begin,
            "mma_v2": lambda a, b, c: a.float() @ b.float() + c,
        }
        self._functions: dict[Any, Any] = {
            fragments.e4m3_bytes_as_float16: _e4m3_bytes_as_float16,
        }

    def function(self, jit: GluonJITFunction) -> Any:
        if jit not in self._functions:
            fn, names = jit.fn, dict(jit.fn.__globals__)
            self._functions[jit] = FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__)
            names |= {name: self._stand_in(value) for name, value in names.items()}
        return self._functions[jit]

    def _stand_in(self, value: Any) -> Any:
        for module, ours in self._modules:
            if value is module:
                return ours
        if isinstance(value, GluonJITFunction):
            return self.function(value)
        is_builtin = getattr(value, "__triton_builtin__", False)
        return self._builtins[value.__name__] if is_builtin else value


class Interpreted:
    """A kernel in Gluon, launched as compiled ones are."""

    def __init__(self, kernel: GluonJITFunction) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def run(*args: Any, num_warps: int, **constants: Any) -> None:
            for index in range(*grid):
                Program(index).function(self._kernel)(*map(_argument, args), **constants)

        return run


def _argument(given: Any) -> Any:
    if isinstance(given, Tensor):
        return Pointer(given)
    return _scalar(given) if isinstance(given, int) else given
