"""Find every MX cast of a graph by what it computes.

A cast is the region between a tensor viewed as blocks and two results: float8 values and one
scale per block. Spellings differ by torchao version, scale mode and chip, so the region is not
compared with patterns but evaluated: its scalar ops run on a fixed probe of blocks on the CPU,
once per spelling, and the outcome is compared bit for bit with ``functional.mx_cast`` under every
scale mode. The probe holds each exponent with the mantissas around which the modes differ, and
the special values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from mxnorm_pass import functional, ops
from mxnorm_pass.formats import ELEMENT_FORMATS, SCALE_MODES, MXFormat
from mxnorm_pass.graph_utils import (
    aten,
    dtype_of,
    forward_users,
    is_backward,
    is_call,
    is_dtype_cast,
    is_view,
    prims,
    same_size,
    tensor_of,
)

_MAX_REGION = 200
_CONSTANTS = frozenset({aten.full.default, aten.scalar_tensor.default, aten.full_like.default})
_REDUCTIONS = frozenset({aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim})
_HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)
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


@dataclass(frozen=True)
class Cast:
    """A recognised MX cast.

    Attributes:
        source: the node whose elements are cast; a view of the tensor, in blocks or not.
        values: node of float8 elements, in ``source``'s row-major order.
        scales: node of one E8M0 scale (or its byte) per block, row-major.
        format: what it computes.
        nodes: everything from ``source`` (excluded) to values and scales.
    """

    source: fx.Node
    values: fx.Node
    scales: fx.Node
    format: MXFormat
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class UnknownCast:
    """A float8 cast of blocks that computes no known MX cast; ``detail`` says how it fails."""

    source: fx.Node
    detail: str


def find_casts(graph: fx.Graph) -> list[Cast | UnknownCast]:
    """All float8 casts of the forward graph, recognised or not, in graph order."""
    found: list[Cast | UnknownCast] = []
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node):
            continue
        if node.target is ops.cast:
            found.append(_own_cast(node))
        elif is_dtype_cast(node) and dtype_of(node) in ELEMENT_FORMATS:
            cast = _match_region(node)
            if cast is not None:
                found.append(cast)
    return found


def _own_cast(node: fx.Node) -> Cast:
    source, block_size, elem_dtype, scale_mode = node.args
    outputs = {user.args[1]: user for user in node.users}
    return Cast(
        source=source,  # type: ignore[arg-type]
        values=outputs[0],
        scales=outputs[1],
        format=MXFormat(elem_dtype, scale_mode, block_size),  # type: ignore[arg-type]
        nodes=frozenset((node, *node.users)),
    )


def _match_region(values: fx.Node) -> Cast | UnknownCast | None:
    region = _collect_region(values)
    if region is None:
        return None
    blocks = region.blocks
    scales = _find_scales(region)
    if scales is None:
        return UnknownCast(blocks, "no scale of one byte per block comes with the values")
    leak = _leak(region, scales)
    if leak is not None:
        return UnknownCast(blocks, f"{leak} inside the cast is read from outside")
    value = tensor_of(blocks)
    assert value is not None
    full = _Region(blocks, (*region.nodes, *(n for n in scales.nodes if n not in region.nodes)))
    fmt = _recognize(full, values, scales.node)
    if fmt is None:
        return UnknownCast(blocks, f"the cast to {values.name} matches no MX scale mode")
    last_values, last_scales = _last_view(values), _last_view(scales.node)
    nodes = frozenset((*full.nodes, last_values, last_scales))
    return Cast(blocks, last_values, last_scales, fmt, nodes)


@dataclass(frozen=True)
class _Region:
    """``nodes`` in topological order, all computed from ``blocks`` and constants."""

    blocks: fx.Node
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Scales:
    node: fx.Node
    nodes: tuple[fx.Node, ...]


def _collect_region(values: fx.Node) -> _Region | None:
    """Walk back from the float8 values to the one blocked view that they come from."""
    blocks: fx.Node | None = None
    order: dict[fx.Node, None] = {}
    visited: set[fx.Node] = {values}
    stack = [(values, iter(values.all_input_nodes))]
    while stack:
        node, inputs = stack[-1]
        child = next(inputs, None)
        if child is None:
            order[node] = None
            stack.pop()
        elif child not in visited:
            visited.add(child)
            if _is_blocked_view(child, values):
                if blocks is not None:
                    return None
                blocks = child
            elif child.op == "get_attr":
                order[child] = None
            elif child.op != "call_function" or len(visited) > _MAX_REGION:
                return None
            else:
                stack.append((child, iter(child.all_input_nodes)))
    return _Region(blocks, tuple(order)) if blocks is not None else None


def _is_blocked_view(node: fx.Node, values: fx.Node) -> bool:
    """A reshape of a high-precision tensor to [..., block size], the float8 values' shape."""
    value, result = tensor_of(node), tensor_of(values)
    if not is_view(node) or value is None or result is None:
        return False
    source = tensor_of(node.args[0])  # type: ignore[arg-type]
    if source is None or value.dtype not in _HIGH_PRECISION or value.ndim < 2:
        return False
    reshaped = source.ndim != value.ndim or not same_size(source.shape[-1], value.shape[-1])
    return reshaped and same_size(value.numel(), result.numel())


def _find_scales(region: _Region) -> _Scales | None:
    """The node that holds the scales' bytes: E8M0 if the graph says so, else bare uint8."""
    bytes_: list[fx.Node] = []
    for node in region.nodes:
        value = tensor_of(node)
        if value is not None and value.dtype == torch.uint8 and not is_view(node):
            bytes_.append(node)
    for node in reversed(bytes_):
        trail = _trail_to_e8m0(node)
        if trail is not None:
            return _Scales(trail[-1], trail)
    inside = set(region.nodes)
    for node in reversed(bytes_):
        if any(user not in inside for user in forward_users(node)):
            return _Scales(node, (node,))
    return None


def _trail_to_e8m0(node: fx.Node) -> tuple[fx.Node, ...] | None:
    pending: list[tuple[fx.Node, ...]] = [(node,)]
    while pending:
        trail = pending.pop()
        for user in forward_users(trail[-1]):
            value = tensor_of(user)
            if value is None:
                continue
            if is_call(user, (aten.view.dtype,)) and value.dtype == torch.float8_e8m0fnu:
                return (*trail, user)
            if is_view(user):
                pending.append((*trail, user))
    return None


def _leak(region: _Region, scales: _Scales) -> fx.Node | None:
    """A node of the region that the graph reads past values and scales."""
    inside = {*region.nodes, *scales.nodes}
    for node in region.nodes[:-1]:
        if node.op == "get_attr" or node.target in _CONSTANTS or node is scales.node:
            continue
        if any(user not in inside for user in node.users):
            return node
    return None


def _last_view(node: fx.Node) -> fx.Node:
    """Follow reshapes that only serve to give the result its final shape."""
    while True:
        users = list(node.users)
        if len(users) != 1 or not is_view(users[0]):
            return node
        node = users[0]


def _recognize(region: _Region, values: fx.Node, scales: fx.Node) -> MXFormat | None:
    value, elem = tensor_of(region.blocks), tensor_of(values)
    assert value is not None and elem is not None
    block_size = value.shape[-1]
    if not isinstance(block_size, int) or block_size < 2:
        return None
    program = _program(region, values, scales)
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


def _program(region: _Region, values: fx.Node, scales: fx.Node) -> _Program | None:
    index: dict[fx.Node, int] = {region.blocks: 0}
    steps: list[_Step] = []
    for node in region.nodes:
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
    if node.target in _CONSTANTS:
        value = tensor_of(node)
        fill = node.args[0 if node.target is aten.scalar_tensor.default else 1]
        if value is None or not isinstance(fill, (int, float, bool)):
            return None
        return _constant_step(fill, value.dtype)
    if node.target in _REDUCTIONS:
        return _block_reduction(node, encode)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise not in tags and node.target not in _EVALUATED:
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "alpha", "rounding_mode")}
    encoded = tuple((k, encode(v)) for k, v in sorted(kwargs.items()))
    return _Step(node.target, tuple(map(encode, node.args)), encoded)


def _attribute_step(node: fx.Node) -> _Step | None:
    owner = node.graph.owning_module
    value = operator.attrgetter(str(node.target))(owner) if owner is not None else None
    if not isinstance(value, Tensor) or value.numel() != 1 or is_fake(value):
        return None
    with _real_tensors():
        return _constant_step(value.item(), value.dtype)


@contextmanager
def _real_tensors() -> Iterator[None]:
    """Leave the fake mode under which graphs are compiled."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        yield


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
    with _real_tensors():
        probe = _probe(source, block_size)
        try:
            values, scales = _evaluate(program, probe)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        for mode in SCALE_MODES:
            want_values, want_scales = functional.mx_cast(
                probe, elem_dtype=elem, scale_mode=mode, block_size=block_size
            )
            if _same_bits(values, want_values) and torch.equal(
                scales.view(torch.uint8).flatten(), want_scales.view(torch.uint8).flatten()
            ):
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


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality of float8 tensors, where all NaNs count as one."""
    if a.numel() != b.numel() or a.dtype != b.dtype:
        return False
    a, b = a.flatten(), b.flatten()
    both_nan = a.float().isnan() & b.float().isnan()
    return bool(((a.view(torch.uint8) == b.view(torch.uint8)) | both_nan).all())


def _probe(dtype: torch.dtype, block_size: int) -> Tensor:
    """Blocks [N, block_size] that tell the scale modes apart."""
    info = torch.finfo(dtype)
    ulp = info.eps
    # Around 1 FLOOR, CEIL and EVEN part; around 1.75 = 448 / 256 (e4m3) and 57344 / 32768 (e5m2)
    # RCEIL does; around 1.9375 and 1.875 EVEN rounds up to the next power of two.
    edges = [1.0, 1.25, 1.5, 1.75, 1.875, 1.9375]
    mantissas = [m + d * ulp for m in edges for d in (-1, 0, 1) if 1 <= m + d * ulp < 2]
    mantissas.append(2 - ulp)
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    largest = torch.tensor(mantissas, dtype=torch.float64)[None, :] * 2.0 ** exponents[:, None]
    largest = largest.flatten()
    largest = largest[largest <= info.max]
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
