"""Nodes of a graph as a function of numbers, to find out by evaluation what they compute.

All shapes are taken out, so that equal spellings are equal programs, whatever tensors they work on,
and each is evaluated once. Ops are pointwise, or reduce the last dimension.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import (
    aten,
    interleaves,
    is_call,
    is_every_other,
    is_view,
    prims,
    tensor_of,
)
from mxnorm_pass.numerics.e8m0 import round_up_to_e8m0

CONSTANTS = frozenset({aten.full.default, aten.scalar_tensor.default, aten.full_like.default})
REDUCTIONS = frozenset({aten.amax.default, aten.amin.default})
_EVALUATED = frozenset(
    {
        prims.convert_element_type.default,
        aten._to_copy.default,
        aten.to.dtype,
        aten.view.dtype,
        aten.where.self,
        aten.index_put.default,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.copy.default,
        aten.full_like.default,
    }
)


def _cvt_rp_ue8m0(x: Tensor) -> Tensor:
    """PTX ``cvt.rp.satfinite.ue8m0x2.f32 d, 0.0, x`` (PTX ISA, cvt): E8M0 of x, rounded up."""
    return round_up_to_e8m0(x).to(torch.uint16)


# Inline assembly that a CPU cannot run; torchao's RCEIL cast has it on sm100.
_ASSEMBLY: dict[str, Callable[[Tensor], Tensor]] = {
    "cvt.rp.satfinite.ue8m0x2.f32 $0, 0.0, $1;": _cvt_rp_ue8m0
}


@dataclass(frozen=True)
class _Step:
    """One node as a function of the inputs and results before it."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Result:
    """Reference to an input or a step's result within a program."""

    index: int


@dataclass(frozen=True)
class Program:
    """What some nodes compute from others, without shapes. Equal programs are equal spellings."""

    steps: tuple[_Step, ...]
    results: tuple[int, ...]

    @classmethod
    def of(
        cls, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], results: Sequence[fx.Node]
    ) -> Program | None:
        """The program of ``nodes``; None where one of them is no known op.

        Args:
            nodes: all that is computed from ``inputs``, in topological order, constants included.
            results: those of them that the program returns.
        """
        index = {node: i for i, node in enumerate(inputs)}
        steps: list[_Step] = []
        for node in nodes:
            step = _step(node, index)
            if step is None:
                return None
            steps.append(step)
            index[node] = len(index)
        return cls(tuple(steps), tuple(index[node] for node in results))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results for tensors in the place of the input nodes.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: as the ops do.
        """
        known = list(inputs)

        def decode(arg: Any) -> Any:
            if isinstance(arg, _Result):
                return known[arg.index]
            if isinstance(arg, tuple):
                return [decode(a) for a in arg]
            return arg

        for step in self.steps:
            kwargs = {k: decode(v) for k, v in step.kwargs}
            known.append(step.target(*map(decode, step.args), **kwargs))
        return tuple(known[i] for i in self.results)


def _identity(x: Tensor) -> Tensor:
    return x


def _every_other(x: Tensor, first: int) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError("where blocks have one number, every other one is another block's")
    return x[..., first::2]


def _interleaved(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors, -1).flatten(-2)


def _step(node: fx.Node, index: dict[fx.Node, int]) -> _Step | None:
    def encode(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return _Result(index[arg])
        if isinstance(arg, (list, tuple)):
            return tuple(map(encode, arg))
        return arg

    if node.op == "get_attr":
        return _attribute_step(node)
    if is_view(node) or is_call(node, (aten.expand.default,)):
        return _Step(_identity, (encode(node.args[0]),), ())
    if node.target in CONSTANTS:
        value = tensor_of(node)
        fill = node.args[0 if node.target is aten.scalar_tensor.default else 1]
        if value is None or not isinstance(fill, (int, float, bool)):
            return None
        return _constant_step(fill, value)
    if node.target in REDUCTIONS:
        return _block_reduction(node, encode)
    if is_every_other(node):
        return _Step(_every_other, (encode(node.args[0]), node.args[2]), ())
    if interleaves(node):
        return _Step(_interleaved, tuple(map(encode, node.args[0])), ())  # type: ignore[arg-type]
    if "asm_str" in node.kwargs:
        return _assembly_step(node, encode)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise not in tags and node.target not in _EVALUATED:
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "alpha", "rounding_mode")}
    encoded = tuple((k, encode(v)) for k, v in sorted(kwargs.items()))
    return _Step(node.target, tuple(map(encode, node.args)), encoded)


def _assembly_step(node: fx.Node, encode: Callable[[Any], Any]) -> _Step | None:
    """``inline_asm_elementwise``, of which only known instructions can be evaluated."""
    instruction = _ASSEMBLY.get(str(node.kwargs["asm_str"]))
    if instruction is None or len(node.args) != 1 or node.kwargs.get("dtype") != torch.uint16:
        return None
    return _Step(instruction, (encode(node.args[0]),), ())


def _attribute_step(node: fx.Node) -> _Step | None:
    owner = node.graph.owning_module
    value = operator.attrgetter(str(node.target))(owner) if owner is not None else None
    if not isinstance(value, Tensor) or value.numel() != 1 or is_fake(value):
        return None
    with real_tensors():
        return _constant_step(value.item(), value)


def _constant_step(fill: float, value: Tensor) -> _Step:
    # One NaN object, so that equal programs compare equal.
    fill = math.nan if fill != fill else fill
    # Dtypes of tensors without dimensions give way to others'.
    return _Step(torch.tensor, ((fill,) if value.ndim else fill,), (("dtype", value.dtype),))


def _block_reduction(node: fx.Node, encode: Callable[[Any], Any]) -> _Step | None:
    source = tensor_of(node.args[0])  # type: ignore[arg-type]
    dims = node.args[1] if len(node.args) > 1 else None
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if source is None or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    if dims[0] % source.ndim != source.ndim - 1:
        return None
    return _Step(node.target, (encode(node.args[0]), (-1,), True), ())
