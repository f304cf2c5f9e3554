"""Norm and MX cast in one: what the fused ops compute."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mxnorm_pass.numerics.cast import (
    Quantized,
    cast_blocks,
    check_tensor_scale,
    mx_cast,
    quantize,
)
from mxnorm_pass.numerics.checks import check_choice
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.layout import ScaleLayout, blocked_scales
from mxnorm_pass.numerics.matmul import Operand, cast_operand
from mxnorm_pass.numerics.norm import normalize
from mxnorm_pass.numerics.philox import Draw
from mxnorm_pass.numerics.rms import (
    Estimator,
    block_absmax,
    blocks,
    mean_square,
    mean_square_from_absmax,
)


@dataclass(frozen=True)
class NormCastSpec:
    """What one fused norm and cast computes: the options of :func:`mxnorm_cast`.

    Attributes:
        norm_dtype: dtype to which x / rms is rounded before the gain; None: float32.
        out_dtype: dtype to which the norm's output is rounded before the cast. Both count where
            ``estimator`` is "exact", and for the cast along T.
        scale_layout: "row-major", or "blocked" as in ``layout.blocked_scales``.
    """

    eps: float
    estimator: Estimator
    p: float
    format: BlockFormat
    norm_dtype: torch.dtype | None
    out_dtype: torch.dtype
    scale_layout: ScaleLayout

    @classmethod
    def of_arguments(cls, *arguments: Any) -> NormCastSpec:
        """Of an op's arguments, which name the format."""
        spec = cls(*arguments)
        return replace(spec, format=block_format(spec.format))

    def arguments(self) -> tuple[Any, ...]:
        """For an op."""
        return tuple(replace(self, format=self.format.name).keywords().values())  # type: ignore[arg-type]

    def keywords(self) -> dict[str, Any]:
        """For :func:`mxnorm_cast`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@torch.no_grad()
def mxnorm_cast(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    p: float = 2.0,
    format: BlockFormat | str = "mxfp8",
    block_weights: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    estimator: Estimator = "mxnorm",
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    scale_layout: ScaleLayout = "row-major",
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and MX cast in one: the op that the rewritten graph calls.

    With ``estimator="mxnorm"`` the block absmaxes of ``x`` give rho~, and rho~ x weight goes to
    the elements with no rounding in between; ``norm_dtype`` and ``out_dtype`` play no part.
    Without ``weight`` the absmaxes times rho~ also give the scales.
    With "exact" the norm is rounded to ``norm_dtype`` and ``out_dtype`` as in :func:`mxnorm`,
    then cast, so that it equals the two steps bit for bit.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight: [D] or None.
        format: a :class:`BlockFormat` or the name of one.
        block_weights: see :func:`rms_estimate`.
        tensor_scale: [] float32, of NVFP4 alone, such as :func:`nvfp4_norm_tensor_scale`, which
            needs no pass over ``x``; None for 1.
        scale_layout: "row-major", or "blocked" as in :func:`blocked_scales`.

    Returns:
        values [..., D], scales [..., K] (or blocked), rho [..., 1] (float32); none carries a
        gradient.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    check_choice("scale_layout", scale_layout, get_args(ScaleLayout))
    fmt = block_format(format)
    check_tensor_scale(tensor_scale, fmt)
    x32 = x.to(torch.float32)
    if estimator == "exact":
        rho = torch.rsqrt(mean_square(x32, estimator, p, fmt.block_size, block_weights) + eps)
        y = normalize(x32, rho, weight, norm_dtype, out_dtype or x.dtype)
        quantized = quantize(y, fmt, tensor_scale)
    else:
        absmax = block_absmax(x32, fmt.block_size)
        square = mean_square_from_absmax(absmax, p, fmt.block_size, block_weights)
        rho = torch.rsqrt(square + eps)
        quantized = _cast_normalized(x32 * rho, absmax * rho, weight, fmt, tensor_scale)
    return quantized.values, _lay_out(quantized.scales, scale_layout), rho


def _cast_normalized(
    y: Tensor,
    absmax: Tensor,
    weight: Tensor | None,
    fmt: BlockFormat,
    tensor_scale: Tensor | None,
) -> Quantized:
    """Cast rows [..., D] times the gain, given the blocks' maxima without it.

    |x| rho is monotonic in |x|, so without a gain these are at hand.
    """
    if weight is not None:
        y = y * weight.to(torch.float32)
        absmax = block_absmax(y, fmt.block_size)
    return cast_blocks(blocks(y, fmt.block_size), absmax.unsqueeze(-1), fmt, tensor_scale)


@torch.no_grad()
def mxnorm_cast_both(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gain_in_rows: bool = True,
    format: BlockFormat | str = "mxfp8",
    tensor_scale: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    along_t: Operand | None = None,
    draw: Draw | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`mxnorm_cast` and the cast of the normalised rows along T, from one rho.

    The forward of a training step multiplies blocks along D, the weight gradient blocks along T.

    Args:
        x: [..., D]; T, the product of the leading dimensions, divisible by the block size.
        gain_in_rows: does the cast along D include the gain? A folded gain does not belong there.
        tensor_scale: of both casts, so that it has to bound the output with its gain.
        along_t: how the cast along T is made where it is not that along D: its format, with E8M0
            scales, its rounding and transform.
        draw: of what is random in that.
        options: the other keywords of :func:`mxnorm_cast`.

    Returns:
        values, scales and rho of :func:`mxnorm_cast`, then values [D, T] and scales
        [D, T / block size] of :func:`mxnorm`'s output, gain included, in its rounding.
    """
    in_rows = mxnorm_cast(
        x,
        weight if gain_in_rows else None,
        format=format,
        tensor_scale=tensor_scale,
        norm_dtype=norm_dtype,
        out_dtype=out_dtype,
        **options,
    )
    y = normalize(x, in_rows[2], weight, norm_dtype, out_dtype or x.dtype)
    columns = y.reshape(-1, x.shape[-1]).t().contiguous()
    if along_t is None:
        return *in_rows, *mx_cast(columns, format, tensor_scale=tensor_scale)
    cast = cast_operand(
        columns, along_t.cast, hadamard=along_t.hadamard, draw=draw, use=along_t.use
    )
    return *in_rows, cast.values, cast.scales


def _lay_out(scales: Tensor, layout: ScaleLayout) -> Tensor:
    if layout == "row-major":
        return scales
    return blocked_scales(scales.view(torch.uint8)).view(scales.dtype)
