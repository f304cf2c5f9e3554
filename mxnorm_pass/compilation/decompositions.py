"""Which ops are taken apart while a graph is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mxnorm_pass.options.config import MXNormConfig

# What matching reads in its parts.
_FUSED_NORMS = ("_fused_rms_norm", "_fused_rms_norm_backward")
# Composite ops that backends match as one: the pass reads the first two and needs none open.
_KEPT_WHOLE = frozenset({"linear", "matmul", "scaled_dot_product_attention"})


def norm_decompositions() -> dict[Any, Any]:
    """Of fused norms alone, for compilers that need no others."""
    from torch._decomp import get_decompositions

    aten = torch.ops.aten
    return get_decompositions([getattr(aten, n) for n in _FUSED_NORMS if hasattr(aten, n)])


def trace_decompositions(config: MXNormConfig) -> dict[Any, Any]:
    """Those that the inner compiler traces with."""
    if config.inner != "inductor":
        return norm_decompositions()
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def export_decompositions() -> dict[Any, Callable[..., Any]]:
    """Of composite ops: norms and casts are spelled in all of them (``rms_norm``, ``type_as``)."""
    table = torch.export.default_decompositions()
    return {op: function for op, function in table.items() if _is_open(op)}


def _is_open(op: Any) -> bool:
    namespace, _, name = op._schema.name.partition("::")
    if namespace != "aten" or name in _KEPT_WHOLE:
        return False
    key = "CompositeImplicitAutograd"
    return name in _FUSED_NORMS or torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)
