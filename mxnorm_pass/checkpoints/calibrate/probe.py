"""Read gain and eps off a norm module by calling it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Of the probes: powers of two, so that the large one's RMS is exact. Beside its square eps is
# nothing, beside the small one's it counts.
_LARGE, _SMALL = 2.0**12, 2.0**-10


@dataclass(frozen=True)
class NormConstants:
    """gain * x / sqrt(mean(x^2) + eps), whatever the module calls them.

    Attributes:
        gain: [D], float32; ones for a norm without a gain.
        eps: added to the mean square.
    """

    gain: Tensor
    eps: float


@torch.no_grad()
def probe(norm: nn.Module, width: int, device: torch.device) -> NormConstants:
    """Run ``norm`` on constant rows [2, width], which the gain and eps follow from."""
    rows = torch.tensor([[_LARGE], [_SMALL]], device=device).expand(2, width).contiguous()
    # Past all hooks. A gain of [1, 1, D] adds a dimension.
    large, small = norm.forward(rows).float().reshape(rows.shape)
    known = large != 0
    if not known.any():
        return NormConstants(large, 0.0)
    # (small / large)^2 = (_SMALL / _LARGE)^2 (_LARGE^2 + eps) / (_SMALL^2 + eps)
    ratio = ((small[known] / large[known]).double() * _LARGE / _SMALL).square().median()
    eps = (_LARGE**2 - ratio * _SMALL**2) / (ratio - 1)
    return NormConstants(large, max(float(eps), 0.0))
