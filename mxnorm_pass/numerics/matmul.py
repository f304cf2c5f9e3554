"""A matmul whose operands are cast as a recipe says: the one place for all three of a linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.numerics import nvfp4
from mxnorm_pass.numerics.cast import Quantized, absmaxes, cast_blocks
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.philox import Draw, Use
from mxnorm_pass.numerics.recipe import MatmulRecipe, OperandCast
from mxnorm_pass.numerics.rms import blocks


@torch.no_grad()
def cast_operand(
    x: Tensor,
    cast: OperandCast,
    *,
    hadamard: Hadamard | None = None,
    draw: Draw | None = None,
    use: Use = Use.LEFT,
) -> Quantized:
    """Transform and cast one operand of a matmul.

    Args:
        x: [R, C], float32, bfloat16 or float16; C is the contraction, a multiple of the block
            size and of ``hadamard``'s.
        cast: has a format; scales of NVFP4 are those of the tensor after the transform.
        hadamard: in float32; what it returns is cast without a rounding in between.
        draw: of what is random, or None where nothing is.
        use: which operand it is; each has words of its own.

    Returns:
        Values and scales of x, or with stochastic rounding of ``cast.headroom`` times x.

    Raises:
        ValueError: C does not fit, there is no format, or something random and no draw.
    """
    fmt = cast.format
    if fmt is None:
        raise ValueError("an operand of high precision has no cast")
    x = x if hadamard is None else hadamard.transform(x, draw)
    in_blocks = blocks(x, fmt.block_size)
    tensor_scale = None if fmt.has_e8m0_scales else nvfp4.nvfp4_tensor_scale(x)
    words = _words(x, cast, draw, use)
    return cast_blocks(
        in_blocks.to(torch.float32),
        absmaxes(in_blocks, cast.square_blocks),
        fmt,
        tensor_scale,
        None if words is None else blocks(words, fmt.block_size),
    )


def _words(x: Tensor, cast: OperandCast, draw: Draw | None, use: Use) -> Tensor | None:
    if not cast.is_stochastic:
        return None
    if draw is None:
        raise ValueError("stochastic rounding needs a seed")
    rows, columns = x.shape
    return draw.words(rows, columns, use)


def recipe_matmul(
    left: Tensor | Quantized,
    right: Tensor,
    recipe: MatmulRecipe,
    draw: Draw | None = None,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """left right^T, its operands cast.

    A contraction that is no multiple of the blocks, or of the transform's pieces, is padded with
    zeros: they change no scale and no sum, so the recipe holds for every shape.

    Args:
        left: [M, C], or the cast that ``recipe.left`` would make of it, from somewhere else.
        right: [R, C].
        recipe: of this matmul.
        draw: of what is random; None where nothing is.
        bias: [R], added to the product.
        dtype: of the matmul, None for that of ``right``; see :meth:`Quantized.dequantize`.

    Returns:
        [M, R] of ``dtype``, accumulated and rounded as its matmul does; where a cast has headroom,
        then times ``recipe.gain``, and rounded again.

    Raises:
        ValueError: something is random and there is no draw.
    """
    dtype = dtype or right.dtype
    a = _factor(left, recipe, Use.LEFT, draw, dtype)
    b = _factor(right, recipe, Use.RIGHT, draw, dtype)
    if recipe.gain == 1:
        return F.linear(a, b, bias)
    product = F.linear(a, b) * recipe.gain
    return product if bias is None else product + bias


def _factor(
    x: Tensor | Quantized,
    recipe: MatmulRecipe,
    use: Use,
    draw: Draw | None,
    dtype: torch.dtype,
) -> Tensor:
    """What is multiplied, [R, C] with C padded."""
    if isinstance(x, Quantized):
        return _padded(x.dequantize(dtype), recipe.multiple)
    if x.shape[-1] == 0:
        return x.to(dtype)
    x = _padded(x, recipe.multiple)
    cast = recipe.left if use is Use.LEFT else recipe.right
    if cast.format is not None:
        # Of a transposed view the values would be one, too, which matmuls sum in another order.
        quantized = cast_operand(x.contiguous(), cast, hadamard=recipe.hadamard, draw=draw, use=use)
        return quantized.dequantize(dtype)
    return (x if recipe.hadamard is None else recipe.hadamard.transform(x, draw)).to(dtype)


def _padded(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[-1] % multiple
    return F.pad(x, (0, missing)) if missing else x
