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
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)

from mxnorm_pass.numerics.formats import ELEMENT_DTYPES, MX_BLOCK_SIZE, BlockFormat, ScaleMode

_OP = "torchao::triton_to_mxfp8_dim0"
_KERNEL = "to_mxfp8_dim0_kernel"
_OPEN_NAMESPACES = frozenset({"aten", "prims", "prim", "mxnorm_pass"})


@dataclass(frozen=True)
class CastOp:
    """A call that returns float8 elements and scales.

    Attributes:
        name: of the op or kernel.
        source: what is cast.
        values, scales: keys of the results.
        format: what it computes; None where that is not known.
    """

    name: str
    source: fx.Node
    values: int | str
    scales: int | str
    format: BlockFormat | None


def cast_op(node: fx.Node) -> CastOp | None:
    """The cast that the call is, None if it is none."""
    if node.target is triton_kernel_wrapper_functional:
        return _kernel(node)
    namespace = getattr(node.target, "namespace", None)
    if namespace is None or namespace in _OPEN_NAMESPACES or not _returns_cast(node):
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    name = node.target._schema.name  # type: ignore[union-attr]
    arguments = {**dict(zip(_names(node.target), node.args, strict=False)), **node.kwargs}
    fmt = None
    if name == _OP:
        block_size = arguments.get("inner_block_size", MX_BLOCK_SIZE)
        fmt = _format(arguments.get("scaling_mode", "rceil"), block_size)
    return CastOp(name, source, 0, 1, fmt)


def _returns_cast(node: fx.Node) -> bool:
    """Does it return elements in float8 with scales in E8M0, or packed ones with those of NVFP4?"""
    outputs = node.meta.get("val")
    if not isinstance(outputs, (list, tuple)):
        return False
    dtypes = {t.dtype for t in outputs if isinstance(t, Tensor)}
    if torch.float8_e8m0fnu in dtypes:
        return not dtypes.isdisjoint(ELEMENT_DTYPES)
    return {torch.uint8, torch.float8_e4m3fn} <= dtypes


def _names(target: Any) -> list[str]:
    return [argument.name for argument in target._schema.arguments]


def _kernel(node: fx.Node) -> CastOp | None:
    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
    while hasattr(kernel, "fn"):
        # Autotuners wrap the compiled function, which wraps the Python one.
        kernel = kernel.fn
    if getattr(kernel, "__name__", None) != _KERNEL:
        return None
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])  # type: ignore[arg-type]
    given: Mapping[str, Any] = node.kwargs["kwargs"]  # type: ignore[assignment]
    arguments = {**constants, **given}
    fmt = _format(arguments.get("SCALING_MODE"), arguments.get("SCALE_BLOCK_SIZE"))
    return CastOp(_KERNEL, arguments["x_ptr"], "output_ptr", "scale_ptr", fmt)


def _format(mode: Any, block_size: Any) -> BlockFormat | None:
    if mode not in get_args(ScaleMode) or not isinstance(block_size, int):
        return None
    return BlockFormat.of(torch.float8_e4m3fn, mode, block_size)
