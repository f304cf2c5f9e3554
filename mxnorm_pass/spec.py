"""What one fused norm and cast computes, in one value that ops and kernels hand on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from mxnorm_pass.config import Estimator
from mxnorm_pass.formats import CastMode, ScaleLayout


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
