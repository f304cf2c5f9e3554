"""Norm and MX cast in one: what the fused ops compute."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor

from mxnorm_pass.numerics.cast import cast_blocks, mx_cast
from mxnorm_pass.numerics.checks import check_choice
from mxnorm_pass.numerics.formats import CastMode
from mxnorm_pass.numerics.layout import ScaleLayout, blocked_scales
from mxnorm_pass.numerics.norm import normalize
from mxnorm_pass.numerics.rms import (
    Estimator,
    block_absmax,
    blocks,
    mean_square,
    mean_square_from_absmax,
)


@torch.no_grad()
def mxnorm_cast(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    p: float = 2.0,
    block_size: int = 32,
    block_weights: Tensor | None = None,
    estimator: Estimator = "mxnorm",
    elem_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_mode: CastMode = "rceil",
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    scale_layout: ScaleLayout = "row-major",
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and MX cast in one: the op that the rewritten graph calls.

    With ``estimator="mxnorm"`` the block absmaxes of ``x`` give rho~, and rho~ x weight goes to
    ``elem_dtype`` with no rounding in between; ``norm_dtype`` and ``out_dtype`` play no part.
    Without ``weight`` the absmaxes times rho~ also give the scales.
    With "exact" the norm is rounded to ``norm_dtype`` and ``out_dtype`` as in :func:`mxnorm`,
    then cast, so that it equals the two steps bit for bit.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight: [D] or None.
        block_weights: see :func:`rms_estimate`.
        scale_layout: "row-major", or "blocked" as in :func:`blocked_scales`.

    Returns:
        values [..., D], scales [..., K] (or blocked), rho [..., 1] (float32); none carries a
        gradient.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    check_choice("scale_layout", scale_layout, get_args(ScaleLayout))
    x32 = x.to(torch.float32)
    if estimator == "exact":
        rho = torch.rsqrt(mean_square(x32, estimator, p, block_size, block_weights) + eps)
        y = normalize(x32, rho, weight, norm_dtype, out_dtype or x.dtype)
        values, scales = mx_cast(
            y, elem_dtype=elem_dtype, scale_mode=scale_mode, block_size=block_size
        )
        return values, _lay_out(scales, scale_layout), rho
    absmax = block_absmax(x32, block_size)
    rho = torch.rsqrt(mean_square_from_absmax(absmax, p, block_size, block_weights) + eps)
    y = x32 * rho
    # |x| rho is monotonic in |x|, so without a gain the blocks' maxima are at hand.
    absmax = absmax * rho
    if weight is not None:
        y = y * weight.to(torch.float32)
        absmax = block_absmax(y, block_size)
    values, scales = cast_blocks(
        x, blocks(y, block_size), absmax.unsqueeze(-1), elem_dtype, scale_mode
    )
    return values, _lay_out(scales, scale_layout), rho


@torch.no_grad()
def mxnorm_cast_both(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gain_in_rows: bool = True,
    elem_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_mode: CastMode = "rceil",
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    block_size: int = 32,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`mxnorm_cast` and the cast of the normalised rows along T, from one rho.

    The forward of a training step multiplies blocks along D, the weight gradient blocks along T.

    Args:
        x: [..., D]; T, the product of the leading dimensions, divisible by ``block_size``.
        gain_in_rows: does the cast along D include the gain? A folded gain does not belong there.
        options: the other keywords of :func:`mxnorm_cast`.

    Returns:
        values, scales and rho of :func:`mxnorm_cast`, then values [D, T] and scales
        [D, T / block_size] of :func:`mxnorm`'s output, gain included, in its rounding.
    """
    cast: dict[str, Any] = {
        "elem_dtype": elem_dtype, "scale_mode": scale_mode, "block_size": block_size
    }  # fmt: skip
    rounding = (norm_dtype, out_dtype or x.dtype)
    in_rows = mxnorm_cast(
        x,
        weight if gain_in_rows else None,
        norm_dtype=norm_dtype,
        out_dtype=out_dtype,
        **cast,
        **options,
    )
    y = normalize(x, in_rows[2], weight, *rounding).reshape(-1, x.shape[-1])
    return *in_rows, *mx_cast(y.t().contiguous(), **cast)


def _lay_out(scales: Tensor, layout: ScaleLayout) -> Tensor:
    if layout == "row-major":
        return scales
    return blocked_scales(scales.view(torch.uint8)).view(torch.float8_e8m0fnu)


@dataclass(frozen=True)
class NormCastSpec:
    """Options of ``functional.mxnorm_cast``, in the order of the ops' arguments.

    Attributes:
        norm_dtype: dtype to which x / rms is rounded before the gain; None: float32.
        out_dtype: dtype to which the norm's output is rounded before the cast. Both count where
            ``estimator`` is "exact", and for the cast along T.
        scale_layout: "row-major", or "blocked" as in ``formats.blocked_scales``.
    """

    eps: float
    estimator: Estimator
    p: float
    block_size: int
    elem_dtype: torch.dtype
    scale_mode: CastMode
    norm_dtype: torch.dtype | None
    out_dtype: torch.dtype
    scale_layout: ScaleLayout

    def keywords(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
