"""Turn a matched norm into MXNorm. Never declines: what is legal was decided in ``match``.

For each norm and MX format::

    x -> norm -> cast -> values, scales          x -> norm_cast -> values, scales, rho
           |                             =>      x -> norm
           +-> high-precision readers                   |
                                                        +-> high-precision readers

What nobody reads any more is dead. A norm that was made an estimate before the graph was
differentiated reads rho of the fused op, as does its derivative. The residual add in front of a
norm goes into the op, too, see ``residual``. Of consumers that dequantise, those that want one
dtype share one ``dequantize`` of values and scales.

A backward that casts the transposed norm output for the weight gradient gets this cast from the
same op::

    x -> norm -> cast                            x -> norm_cast_both -> values, scales, rho,
           |                                 =>                         values_t, scales_t
           +-> transpose -> cast (backward)
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mxnorm_pass.graph.cleanup import merge_equal
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.passes.match.fusion import Fusion
from mxnorm_pass.passes.rewrite.casts import fuse_casts
from mxnorm_pass.passes.rewrite.estimate import block_weights, share_rho
from mxnorm_pass.passes.rewrite.gain import fold_gain, with_flat_gain
from mxnorm_pass.passes.rewrite.residual_add import fuse_residual_add


def rewrite(graph: fx.Graph, fusion: Fusion, tracer: FunctionTracer) -> None:
    """Edit one fusion into the graph; dead nodes are left for the caller to remove."""
    fusion = replace(fusion, norm=with_flat_gain(graph, fusion.norm))
    at = fusion.norm.anchor if fusion.norm.estimated else fusion.norm.output.next
    weights = block_weights(graph, fusion, at)
    rhos = [fuse_casts(graph, fusion, cast, weights, at, tracer) for cast in fusion.casts]
    merge_equal(sorted({node for c in fusion.consumers for node in c.linear.slice}))
    if fusion.gain == "fold":
        fold_gain(graph, fusion)
    if fusion.norm.estimated:
        share_rho(graph, fusion, rhos[0], weights, tracer)
    if fusion.residual is not None:
        op, _ = rhos[0].args
        fuse_residual_add(graph, op, fusion.residual)  # type: ignore[arg-type]
