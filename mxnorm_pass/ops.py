"""Custom ops that the rewritten graph calls: schema, fake tensors, dispatch, decomposition.

``mxnorm_pass::norm_cast``   norm and MX cast in one (``functional.mxnorm_cast``)
``mxnorm_pass::cast``        MX cast (``functional.mx_cast``)
``mxnorm_pass::dequantize``  back to high precision (``functional.mx_dequantize``)

Results are contiguous, whatever the strides of what is given. Each op stays one node in the joint
graph, where people read it and the partitioner treats it as one. :func:`decompose` replaces the
nodes by their ATen ops where Inductor is to fuse them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass import functional
from mxnorm_pass.graph_utils import SubgraphCache

NAMESPACE = "mxnorm_pass"


def _norm_cast(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    estimator: str,
    p: float,
    block_size: int,
    elem_dtype: torch.dtype,
    scale_mode: str,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    scale_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return functional.mxnorm_cast(
        x.contiguous(),
        weight,
        eps=eps,
        estimator=estimator,  # type: ignore[arg-type]
        p=p,
        block_size=block_size,
        elem_dtype=elem_dtype,
        scale_mode=scale_mode,  # type: ignore[arg-type]
        norm_dtype=norm_dtype,
        out_dtype=out_dtype,
        scale_layout=scale_layout,  # type: ignore[arg-type]
    )


def _cast(
    x: Tensor, block_size: int, elem_dtype: torch.dtype, scale_mode: str
) -> tuple[Tensor, Tensor]:
    return functional.mx_cast(
        x.contiguous(),
        block_size=block_size,
        elem_dtype=elem_dtype,
        scale_mode=scale_mode,  # type: ignore[arg-type]
    )


def _dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return functional.mx_dequantize(values.contiguous(), scales, dtype)


def _fake_cast(
    x: Tensor, block_size: int, elem_dtype: torch.dtype, scale_mode: str
) -> tuple[Tensor, Tensor]:
    shape = x.shape
    scales = x.new_empty((*shape[:-1], shape[-1] // block_size), dtype=torch.float8_e8m0fnu)
    return x.new_empty(shape, dtype=elem_dtype), scales


def _fake_norm_cast(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    estimator: str,
    p: float,
    block_size: int,
    elem_dtype: torch.dtype,
    scale_mode: str,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    scale_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values, scales = _fake_cast(x, block_size, elem_dtype, scale_mode)
    if scale_layout == "blocked":
        scales = functional.blocked_scales(scales)
    return values, scales, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


_library = torch.library.Library(NAMESPACE, "DEF")


def _define(schema: str, eager: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _library.impl(name, _without_derivative(op), "Autograd")
    return op


def _without_derivative(op: Any) -> Callable[..., Any]:
    """Refuse to be differentiated: the graphs that call the ops have their backward already."""

    def forward(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"{op} has no derivative: what mxnorm_pass.apply rewrote is for inference. Run it "
                "under torch.no_grad(), or train with torch.compile(model, backend='mxnorm')"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return forward


norm_cast = _define(
    "norm_cast(Tensor x, Tensor? weight, float eps, str estimator, float p, int block_size, "
    "ScalarType elem_dtype, str scale_mode, ScalarType? norm_dtype, ScalarType out_dtype, "
    "str scale_layout) "
    "-> (Tensor values, Tensor scales, Tensor rho)",
    _norm_cast,
    _fake_norm_cast,
)
cast = _define(
    "cast(Tensor x, int block_size, ScalarType elem_dtype, str scale_mode) "
    "-> (Tensor values, Tensor scales)",
    _cast,
    _fake_cast,
)
dequantize = _define(
    "dequantize(Tensor values, Tensor scales, ScalarType dtype) -> Tensor",
    _dequantize,
    _fake_dequantize,
)

_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    norm_cast: _norm_cast,
    cast: _cast,
    dequantize: _dequantize,
}


def decompose(graph: fx.Graph, decompositions: Mapping[Any, Any]) -> int:
    """Replace every op of this package in ``graph`` by its ATen ops; returns how many."""
    subgraphs = SubgraphCache(decompositions)
    replaced = 0
    for op, function in _DECOMPOSITIONS.items():
        for node in graph.find_nodes(op="call_function", target=op):
            outputs = subgraphs.graft(graph, node, function, node.args)
            if isinstance(outputs, tuple):
                _replace_getitems(node, outputs)
            else:
                node.replace_all_uses_with(outputs)
            graph.erase_node(node)
            replaced += 1
    return replaced


def _replace_getitems(node: fx.Node, outputs: tuple[fx.Node, ...]) -> None:
    for getitem in list(node.users):
        getitem.replace_all_uses_with(outputs[getitem.args[1]])  # type: ignore[index]
        getitem.graph.erase_node(getitem)
