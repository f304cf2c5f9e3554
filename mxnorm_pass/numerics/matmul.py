"""A matmul whose operands are cast as a recipe says: the one place for all three of a linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxnorm_pass.numerics import nvfp4
from mxnorm_pass.numerics.cast import Quantized, absmaxes, cast_blocks
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.philox import Draw, Matmul, Use
from mxnorm_pass.numerics.recipe import MatmulRecipe, OperandCast
from mxnorm_pass.numerics.rms import blocks


@dataclass(frozen=True)
class Operand:
    """What becomes of one operand of a matmul before it is multiplied.

    Attributes:
        cast: with a format.
        hadamard: the transform before the cast.
        matmul, use: whose random numbers it takes.
    """

    cast: OperandCast
    hadamard: Hadamard | None
    matmul: Matmul
    use: Use

    @property
    def has_random_signs(self) -> bool:
        return self.hadamard is not None and self.hadamard.signs == "random"

    @property
    def is_random(self) -> bool:
        """Does it need a seed?"""
        return self.has_random_signs or self.cast.is_stochastic

    @property
    def is_plain(self) -> bool:
        """Is it rounded to nearest as it is?"""
        return self.hadamard is None and not self.cast.is_stochastic


# Of an operand [R, C] with C padded, its draw and a dtype: what is multiplied, in that dtype.
ReadOperand = Callable[[Tensor, Operand, Draw | None, torch.dtype], Tensor]


@torch.no_grad()
def cast_operand(
    x: Tensor,
    cast: OperandCast,
    *,
    hadamard: Hadamard | None = None,
    draw: Draw | None = None,
    use: Use = Use.LEFT,
    tensor_scale: Tensor | None = None,
) -> Quantized:
    """Transform and cast one operand of a matmul.

    Args:
        x: [R, C], float32, bfloat16 or float16; C is the contraction, a multiple of the block
            size and of ``hadamard``'s.
        cast: has a format.
        hadamard: in float32; what it returns is cast without a rounding in between.
        draw: of what is random, or None where nothing is.
        use: which operand it is; each has random numbers of its own.
        tensor_scale: [] float32, of NVFP4; None for that of what is cast.

    Returns:
        Values and scales of x, or with stochastic rounding of ``cast.headroom`` times x.

    Raises:
        ValueError: C does not fit, there is no format, or something random and no draw.
    """
    fmt = cast.format
    if fmt is None:
        raise ValueError("an operand of high precision has no cast")
    x = transform_operand(x, hadamard, draw)
    in_blocks = blocks(x, fmt.block_size)
    if tensor_scale is None and not fmt.has_e8m0_scales:
        tensor_scale = nvfp4.nvfp4_tensor_scale(x)
    numbers = _numbers(x, cast, draw, use)
    return cast_blocks(
        in_blocks.to(torch.float32),
        absmaxes(in_blocks, cast.square_blocks),
        fmt,
        tensor_scale,
        None if numbers is None else blocks(numbers, fmt.block_size),
    )


def transform_operand(x: Tensor, hadamard: Hadamard | None, draw: Draw | None) -> Tensor:
    """[R, C] in float32 where there is a transform, else as it is."""
    return x if hadamard is None else hadamard.transform(x, draw)


def _numbers(x: Tensor, cast: OperandCast, draw: Draw | None, use: Use) -> Tensor | None:
    if not cast.is_stochastic:
        return None
    if draw is None:
        raise ValueError("stochastic rounding needs a seed")
    rows, columns = x.shape
    return draw.numbers(rows, columns, use)


def recipe_matmul(
    left: Tensor | Quantized,
    right: Tensor,
    recipe: MatmulRecipe,
    draw: Draw | None = None,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    matmul: Matmul = "forward",
    read: ReadOperand | None = None,
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
        matmul: which of a linear it is, where there is no ``draw`` to say it.
        read: how an operand with a format is cast and widened; None: :func:`cast_operand`.

    Returns:
        [M, R] of ``dtype``, accumulated and rounded as its matmul does; where a cast has headroom,
        then times ``recipe.gain``, and rounded again.

    Raises:
        ValueError: something is random and there is no draw.
    """
    dtype = dtype or right.dtype
    matmul = matmul if draw is None else draw.matmul
    read = read or _cast_and_widen
    sides = ((left, recipe.left, Use.LEFT), (right, recipe.right, Use.RIGHT))
    a, b = (
        _factor(x, Operand(cast, recipe.hadamard, matmul, use), recipe.multiple, draw, dtype, read)
        for x, cast, use in sides
    )
    if recipe.gain == 1:
        return F.linear(a, b, bias)
    product = F.linear(a, b) * recipe.gain
    return product if bias is None else product + bias


def _factor(
    x: Tensor | Quantized,
    operand: Operand,
    multiple: int,
    draw: Draw | None,
    dtype: torch.dtype,
    read: ReadOperand,
) -> Tensor:
    """What is multiplied, [R, C] with C padded."""
    if isinstance(x, Quantized):
        return _padded(x.dequantize(dtype), multiple)
    if x.shape[-1] == 0:
        return x.to(dtype)
    x = _padded(x, multiple)
    if operand.cast.format is not None:
        return read(x, operand, draw, dtype)
    return transform_operand(x, operand.hadamard, draw).to(dtype)


def _cast_and_widen(x: Tensor, operand: Operand, draw: Draw | None, dtype: torch.dtype) -> Tensor:
    # Of a transposed view the values would be one, too, which matmuls sum in another order.
    x, hadamard, use = x.contiguous(), operand.hadamard, operand.use
    return cast_operand(x, operand.cast, hadamard=hadamard, draw=draw, use=use).dequantize(dtype)


def _padded(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[-1] % multiple
    return F.pad(x, (0, missing)) if missing else x
