"""MXNorm and MX casts without a compiler: eager, differentiable; defined in ``numerics``.

The graph rewrite traces these functions and grafts them in, and every kernel is tested against
them. Source: McLean et al. 2026, "MXNorm", arXiv 2603.13180; OCP Microscaling specification v1.0.

Shapes: ``T`` rows of ``D`` elements, cut into ``K = D / block_size`` blocks of ``B`` elements.
Leading dimensions are free; blocks lie along the last one.
"""

from __future__ import annotations

from mxnorm_pass.numerics.cast import mx_cast, mx_dequantize
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.hadamard import Hadamard, hadamard_transform
from mxnorm_pass.numerics.layout import blocked_scales
from mxnorm_pass.numerics.linear import mx_linear, recipe_linear
from mxnorm_pass.numerics.matmul import cast_operand, recipe_matmul
from mxnorm_pass.numerics.norm import inverse_rms, inverse_rms_vjp, mxnorm, mxnorm_vjp, normalize
from mxnorm_pass.numerics.norm_cast import mxnorm_cast, mxnorm_cast_both
from mxnorm_pass.numerics.nvfp4 import nvfp4_norm_tensor_scale, nvfp4_tensor_scale
from mxnorm_pass.numerics.parse_recipe import recipe
from mxnorm_pass.numerics.philox import Draw
from mxnorm_pass.numerics.recipe import RECIPES, MatmulRecipe, OperandCast, Recipe
from mxnorm_pass.numerics.rms import bound_of_normalized, rms_constant, rms_estimate
from mxnorm_pass.numerics.seed import draw_seed

__all__ = [
    "RECIPES",
    "BlockFormat",
    "Draw",
    "Hadamard",
    "MatmulRecipe",
    "OperandCast",
    "Recipe",
    "block_format",
    "blocked_scales",
    "bound_of_normalized",
    "cast_operand",
    "draw_seed",
    "hadamard_transform",
    "inverse_rms",
    "inverse_rms_vjp",
    "mx_cast",
    "mx_dequantize",
    "mx_linear",
    "mxnorm",
    "mxnorm_cast",
    "mxnorm_cast_both",
    "mxnorm_vjp",
    "normalize",
    "nvfp4_norm_tensor_scale",
    "nvfp4_tensor_scale",
    "recipe",
    "recipe_linear",
    "recipe_matmul",
    "rms_constant",
    "rms_estimate",
]
