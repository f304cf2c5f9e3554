"""The scale of the tensor, in formats that have one, of what a fused op casts."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.numerics.norm import mxnorm
from mxnorm_pass.numerics.nvfp4 import nvfp4_norm_tensor_scale, nvfp4_tensor_scale
from mxnorm_pass.passes.match.fusion import FusedCast, Fusion


def tensor_scale_of(
    graph: fx.Graph,
    fusion: Fusion,
    cast: FusedCast,
    gain: fx.Node | None,
    block_weights: fx.Node | None,
    at: fx.Node,
    tracer: FunctionTracer,
) -> fx.Node | None:
    """The node that computes it, before ``at``; None where the matched cast has none.

    An estimate may be below the RMS, so that what it normalises wants a scale of its own.

    Args:
        gain: the norm's, if the cast includes it.
    """
    if not cast.rescales:
        return cast.tensor_scale
    norm, spec, bound = fusion.norm, cast.spec, fusion.bound_of(cast.spec)
    if bound is not None:
        return norm_tensor_scale(graph, bound, gain, at, norm.output, tracer)
    options = (spec.eps, spec.p, spec.format.block_size)
    args = (norm.x, gain, block_weights, *options)
    node: fx.Node = tracer.graft(graph, at, _from_elements, args, norm.output)
    return node


def norm_tensor_scale(
    graph: fx.Graph,
    bound: float,
    gain: fx.Node | None,
    at: fx.Node,
    origin: fx.Node,
    tracer: FunctionTracer,
) -> fx.Node:
    """``nvfp4_norm_tensor_scale`` before ``at``, on the device of the node ``origin``."""
    value = tensor_of(origin)
    assert value is not None
    args = (bound, gain, str(value.device))
    node: fx.Node = tracer.graft(graph, at, _from_bound, args, origin)
    return node


def _from_bound(bound: float, gain: Tensor | None, device: str) -> Tensor:
    return nvfp4_norm_tensor_scale(bound, gain, torch.device(device))


def _from_elements(
    x: Tensor,
    gain: Tensor | None,
    block_weights: Tensor | None,
    eps: float,
    p: float,
    block_size: int,
) -> Tensor:
    y = mxnorm(
        x,
        gain,
        eps=eps,
        p=p,
        block_size=block_size,
        block_weights=block_weights,
        out_dtype=torch.float32,
    )
    return nvfp4_tensor_scale(y)
