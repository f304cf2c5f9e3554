"""Evaluate a cast's scalar ops on a fixed probe of blocks and name what they compute.

The program of a cast is its nodes with all shapes taken out, so that each spelling is evaluated
once. The outcome is compared bit for bit with ``functional.mx_cast`` under every scale mode; the
probe holds each exponent with the mantissas around which the modes differ, and the special values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from mxnorm_pass import functional
from mxnorm_pass.formats import (
    CAST_MODES,
    E8M0_NAN,
    MXFormat,
    element_format,
    round_up_to_e8m0,
)
from mxnorm_pass.graph_utils import aten, is_call, is_view, prims, real_tensors, tensor_of

CONSTANTS = frozenset({aten.full.default, aten.scalar_tensor.default, aten.full_like.default})
_REDUCTIONS = frozenset({aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim})
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


def recognize(
    blocks: fx.Node, nodes: Sequence[fx.Node], values: fx.Node, scales: fx.Node
) -> MXFormat | None:
    """The MX format that a region casts to; None if it is none.

    Args:
        blocks: [..., B], the node from which all is computed.
        nodes: the region in topological order, constants included.
        values: the region's node of float8 elements.
        scales: the region's node of one byte per block.
    """
    value, elem = tensor_of(blocks), tensor_of(values)
    assert value is not None and elem is not None
    block_size = value.shape[-1]
    if not isinstance(block_size, int) or block_size < 2:
        return None
    program = _program(blocks, nodes, values, scales)
    if program is None:
        return None
    return _classify(program, value.dtype, elem.dtype, block_size)


@dataclass(frozen=True)
class _Step:
    """One node of a region as a function of the results before it (0 is the probe)."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Result:
    """Reference to a step's result within a program."""

    index: int


@dataclass(frozen=True)
class _Program:
    """A region with its shapes taken out; equal programs are equal spellings."""

    steps: tuple[_Step, ...]
    values: int
    scales: int


def _identity(x: Tensor) -> Tensor:
    return x


def _program(
    blocks: fx.Node, nodes: Sequence[fx.Node], values: fx.Node, scales: fx.Node
) -> _Program | None:
    index: dict[fx.Node, int] = {blocks: 0}
    steps: list[_Step] = []
    for node in nodes:
        step = _step(node, index)
        if step is None:
            return None
        steps.append(step)
        index[node] = len(steps)
    return _Program(tuple(steps), index[values], index[scales])


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
        return _constant_step(fill, value.dtype)
    if node.target in _REDUCTIONS:
        return _block_reduction(node, encode)
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
        return _constant_step(value.item(), value.dtype)


def _constant_step(value: float, dtype: torch.dtype) -> _Step:
    # One NaN object, so that equal programs compare equal.
    value = math.nan if value != value else value
    return _Step(torch.tensor, (value,), (("dtype", dtype),))


def _block_reduction(node: fx.Node, encode: Callable[[Any], Any]) -> _Step | None:
    source = tensor_of(node.args[0])  # type: ignore[arg-type]
    dims = node.args[1] if len(node.args) > 1 else None
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if source is None or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    if dims[0] % source.ndim != source.ndim - 1:
        return None
    if node.target not in (aten.amax.default, aten.amin.default):
        return None
    return _Step(node.target, (encode(node.args[0]), (-1,), True), ())


@lru_cache(maxsize=256)
def _classify(
    program: _Program, source: torch.dtype, elem: torch.dtype, block_size: int
) -> MXFormat | None:
    """Run the program on the probe and find the scale mode that gives the same bits."""
    with real_tensors():
        probe = _probe(source, elem, block_size)
        try:
            values, scales = _evaluate(program, probe)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        # "rceil-log2" comes last: of bfloat16 and float16 it gives the bits of "rceil".
        for mode in CAST_MODES:
            want_values, want_scales = functional.mx_cast(
                probe, elem_dtype=elem, scale_mode=mode, block_size=block_size
            )
            if _same_cast(values, scales, want_values, want_scales):
                return MXFormat(elem, mode, block_size)
    return None


def _evaluate(program: _Program, probe: Tensor) -> tuple[Tensor, Tensor]:
    results = [probe]

    def decode(arg: Any) -> Any:
        if isinstance(arg, _Result):
            return results[arg.index]
        if isinstance(arg, tuple):
            return [decode(a) for a in arg]
        return arg

    for step in program.steps:
        kwargs = {k: decode(v) for k, v in step.kwargs}
        results.append(step.target(*map(decode, step.args), **kwargs))
    return results[program.values], results[program.scales]


def _same_cast(values: Tensor, scales: Tensor, want_values: Tensor, want_scales: Tensor) -> bool:
    """Equality bit for bit, where all NaNs count as one: also those that a NaN scale makes."""
    if values.numel() != want_values.numel() or values.dtype != want_values.dtype:
        return False
    scale, want_scale = (s.view(torch.uint8).flatten() for s in (scales, want_scales))
    if not torch.equal(scale, want_scale):
        return False
    a, b = values.reshape(want_values.shape), want_values
    both_nan = a.float().isnan() & b.float().isnan()
    same = (a.view(torch.uint8) == b.view(torch.uint8)) | both_nan
    return bool((same | (want_scale == E8M0_NAN).view(-1, 1)).all())


def _probe(dtype: torch.dtype, elem: torch.dtype, block_size: int) -> Tensor:
    """Blocks [N, block_size] that tell the scale modes apart."""
    info = torch.finfo(dtype)
    ulp = info.eps
    # Around 1 FLOOR, CEIL and EVEN part; around 1.75 = 448 / 256 (e4m3) and 57344 / 32768 (e5m2)
    # RCEIL does, and its log2 rounds down the float32 above where the exponent is not near 0;
    # around 1.9375 and 1.875 EVEN rounds up to the next power of two.
    edges = [1.0, 1.25, 1.5, 1.75, 1.875, 1.9375]
    mantissas = [m + d * ulp for m in edges for d in (-1, 0, 1) if 1 <= m + d * ulp < 2]
    mantissas.append(2 - ulp)
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    largest = torch.tensor(mantissas, dtype=torch.float64)[None, :] * 2.0 ** exponents[:, None]
    largest = largest.flatten()
    largest = largest[largest <= info.max]
    # The quotient by elem.max is rounded to float32 before PTX or a comparison sees it. That
    # moves one absmax across a power of two: to 2**-127, the smallest scale, which no block of a
    # normalised row or of a weight comes near.
    quotient = largest / element_format(elem).max
    largest = largest[(quotient <= 2.0**-127) | (quotient.float() > 2.0**-127)]
    shape = torch.linspace(-1, 1, block_size - 1, dtype=torch.float64)
    shape = torch.cat([torch.ones(1, dtype=torch.float64), shape * 2.0 ** -(shape.abs() * 12)])
    probe = (largest[:, None] * shape[None, :]).to(dtype)
    return torch.cat([probe, _special_blocks(dtype, block_size)])


def _special_blocks(dtype: torch.dtype, block_size: int) -> Tensor:
    inf, nan = float("inf"), float("nan")
    firsts: Sequence[float] = (0.0, -0.0, nan, inf, -inf, torch.finfo(dtype).max)
    blocks = torch.ones(len(firsts) + 1, block_size, dtype=dtype)
    for row, first in enumerate(firsts):
        blocks[row, 0] = first
    blocks[-1] = 0.0
    return blocks
