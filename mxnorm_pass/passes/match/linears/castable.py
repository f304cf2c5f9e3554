"""Which plain linears the backend may cast."""

from __future__ import annotations

import torch

from mxnorm_pass.graph.code import type_name
from mxnorm_pass.graph.matmul import UNREACHED
from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.linears.plain import PlainLinear
from mxnorm_pass.passes.match.linears.router import is_router

_LINEAR_DTYPES = (torch.bfloat16, torch.float32)


def obstacle(linear: PlainLinear, config: MXNormConfig) -> str | None:
    """What keeps the backend from casting a plain linear, None where it casts it.

    The words follow "a linear in bf16". Block-scaled matmuls want both sides of the weight
    in whole blocks; that leaves out small adapters.
    """
    if config.quantize == "existing":
        return "that quantize='existing' leaves without a cast"
    if not config.resolve(linear.name, opt_in=linear.opt_in or is_router(linear)).enabled:
        if config.turns_off(linear.name):
            return "that `modules` turns off"
        return "that is cast only if `modules` names it"
    resolved = config.resolve(linear.name)
    if resolved.kept_by_depth:
        return resolved.kept_by_depth
    own = resolved.config
    if own.recipe is not None and linear.matmul.meta.get(UNREACHED):
        return (
            "whose backward no recipe reaches: it is no call of F.linear, or in a branch or a "
            "region of its own"
        )
    activation, weight = tensor_of(linear.activation), tensor_of(linear.weight)
    if activation is None or weight is None or activation.dtype != weight.dtype:
        return f"whose weight is {type_name(linear.weight)}"
    block_size = own.cast_format.block_size
    if own.casts_forward and not all(
        isinstance(n, int) and n % block_size == 0 for n in weight.shape
    ):
        return f"whose weight {list(weight.shape)} is not in whole blocks of {block_size}"
    if activation.dtype not in _LINEAR_DTYPES:
        return "where only bf16 and f32 get casts"
    return None
