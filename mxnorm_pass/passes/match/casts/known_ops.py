"""Casts whose inside no graph shows: an op of some library, or a Triton kernel.

Known by name are torchao's ``triton_to_mxfp8_dim0`` and the kernel that torch.compile finds in it
(torchao/prototype/mx_formats/kernels.py). They cast bf16 to e4m3 along the last dimension with
row-major scales. Values and scales are those of ``functional.mx_cast`` but for blocks whose scale
would be below 2**-126, which no normalised row has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._ops import OpOverload

from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES, MX_BLOCK_SIZE, BlockFormat, ScaleMode
from mxnorm_pass.passes.match.casts.region import HIGH_PRECISION

_OP = "torchao::triton_to_mxfp8_dim0"
_KERNEL = "to_mxfp8_dim0_kernel"
_OPEN_NAMESPACES = frozenset({"aten", "prims", "prim", "mxnorm_pass"})
_FUNCTIONALIZED = (auto_functionalized, auto_functionalized_v2)
# Of elements of any number of bits, and of their scales.
_BYTES = {torch.uint8, torch.int8, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, *ELEMENT_DTYPES}


@dataclass(frozen=True)
class CastOp:
    """A call that returns elements of few bits and scales.

    Attributes:
        name: of the op or kernel.
        source: what is cast.
        values, scales: keys of the results, where they are known.
        format: what it computes; None where that is not known.
    """

    name: str
    source: fx.Node
    values: int | str
    scales: int | str
    format: BlockFormat | None


def cast_op(node: fx.Node) -> CastOp | None:
    """The cast that the call is, None if it is none."""
    called = _called(node)
    if called is None or not _returns_cast(node):
        return None
    name, arguments = called
    if name == _OP:
        block_size = arguments.get("inner_block_size", MX_BLOCK_SIZE)
        fmt = _format(arguments.get("scaling_mode", "rceil"), block_size)
        return CastOp(name, arguments["x"], 0, 1, fmt)
    if name == _KERNEL:
        fmt = _format(arguments.get("SCALING_MODE"), arguments.get("SCALE_BLOCK_SIZE"))
        return CastOp(name, arguments["x_ptr"], "output_ptr", "scale_ptr", fmt)
    source = next(filter(_may_be_cast, arguments.values()), None)
    return CastOp(name, source, 0, 1, None) if source is not None else None


def _called(node: fx.Node) -> tuple[str, Mapping[str, Any]] | None:
    """The library's op or the kernel that a node calls, and its arguments by name."""
    if node.target is triton_kernel_wrapper_functional:
        return _kernel(node)
    if node.target in _FUNCTIONALIZED:
        # An op that writes into its arguments.
        op: Any = node.args[0]
        return op._schema.name, node.kwargs
    if not isinstance(node.target, OpOverload) or node.target.namespace in _OPEN_NAMESPACES:
        return None
    schema = node.target._schema
    names = (argument.name for argument in schema.arguments)
    return schema.name, {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _kernel(node: fx.Node) -> tuple[str, Mapping[str, Any]]:
    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
    while hasattr(kernel, "fn"):
        # Autotuners wrap the compiled function, which wraps the Python one.
        kernel = kernel.fn
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])  # type: ignore[arg-type]
    given: Mapping[str, Any] = node.kwargs["kwargs"]  # type: ignore[assignment]
    return getattr(kernel, "__name__", "a Triton kernel"), {**constants, **given}


def _returns_cast(node: fx.Node) -> bool:
    """Does it return elements and scales, whatever dtypes it gives their bytes?"""
    outputs = node.meta.get("val")
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if not isinstance(outputs, (list, tuple)):
        return False
    return sum(isinstance(t, Tensor) and t.dtype in _BYTES for t in outputs) > 1


def _may_be_cast(argument: Any) -> bool:
    value = tensor_of(argument) if isinstance(argument, fx.Node) else None
    return value is not None and value.ndim > 1 and value.dtype in HIGH_PRECISION


def _format(mode: Any, block_size: Any) -> BlockFormat | None:
    if mode not in get_args(ScaleMode) or not isinstance(block_size, int):
        return None
    return BlockFormat.of(torch.float8_e4m3fn, mode, block_size)
