"""The ops that a rewritten graph calls: all that is known of each stands in one row, an ``Op``.

``mxnorm_pass::norm_cast``           norm and MX cast in one (``functional.mxnorm_cast``)
``mxnorm_pass::norm_cast_both``      the same, cast along D and along T
                                     (``functional.mxnorm_cast_both``)
``mxnorm_pass::add_norm_cast``       residual add first; its sum is a result, too
``mxnorm_pass::add_norm_cast_both``  both
``mxnorm_pass::cast``                MX cast (``functional.mx_cast``)
``mxnorm_pass::tensor_scale``        NVFP4's scale of a tensor (``functional.nvfp4_tensor_scale``)
``mxnorm_pass::dequantize``          back to high precision (``functional.mx_dequantize``)
``mxnorm_pass::mx_linear``           a linear on MX operands (``functional.mx_linear``)
``mxnorm_pass::few_rows_mx_linears``  several of one x, by a kernel where one covers them
``mxnorm_pass::inverse_rms``         the estimate alone, differentiable (``functional.inverse_rms``)
``mxnorm_pass::inverse_rms_backward``  its derivative (``functional.inverse_rms_vjp``)
``mxnorm_pass::linear``              a linear whose backward knows whose it is
``mxnorm_pass::operand_cast``        an operand of a matmul, transformed or rounded at random
                                     (``functional.cast_operand``)
``mxnorm_pass::operand_tensor_scale``  NVFP4's scale of such an operand
``mxnorm_pass::recipe_matmul``       a matmul that casts its operands
                                     (``numerics.matmul.recipe_matmul``)
``mxnorm_pass::mark``                computes nothing; says where in a traced graph a place of
                                     Dynamo's graph is

Results are contiguous, whatever the strides of what is given. Each op stays one node in the joint
graph, where people read it and the partitioner treats it as one. On CUDA devices a Triton kernel
runs, elsewhere, and where no kernel covers the case, the decomposition: ``numerics``. In a
compiled graph ``passes.lower`` makes the same choice.
"""

from __future__ import annotations

from typing import Any

from mxnorm_pass.ops.casts import cast, dequantize, tensor_scale
from mxnorm_pass.ops.define import NAMESPACE, OPS, Op
from mxnorm_pass.ops.estimates import inverse_rms, inverse_rms_backward
from mxnorm_pass.ops.linears import linear, recipe_matmul
from mxnorm_pass.ops.marks import mark
from mxnorm_pass.ops.mx_linear import few_rows_mx_linears, mx_linear
from mxnorm_pass.ops.norm_casts import add_norm_cast, add_norm_cast_both, norm_cast, norm_cast_both
from mxnorm_pass.ops.operands import operand_cast, operand_tensor_scale


def normalizes(target: Any) -> bool:
    """Is it an op that normalises rows and casts them?"""
    return target in OPS and "rho" in [result.name for result in target._schema.returns]


__all__ = [
    "NAMESPACE",
    "OPS",
    "Op",
    "add_norm_cast",
    "add_norm_cast_both",
    "cast",
    "dequantize",
    "few_rows_mx_linears",
    "inverse_rms",
    "inverse_rms_backward",
    "linear",
    "mark",
    "mx_linear",
    "norm_cast",
    "norm_cast_both",
    "normalizes",
    "operand_cast",
    "operand_tensor_scale",
    "recipe_matmul",
    "tensor_scale",
]
