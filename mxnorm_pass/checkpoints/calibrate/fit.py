"""Non-negative block weights by least squares, from sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxnorm_pass.extras import needs_extra


@dataclass(frozen=True)
class Moments:
    """What the fit of one norm needs of its tokens, in float64.

    With a[t, k] = (m[t, k] / rms[t])^p, the weights w that estimate rms^p best in relative error
    minimise sum_t (sum_k w_k a[t, k] - 1)^2.

    Attributes:
        gram: [K, K], sum_t a[t, i] a[t, j].
        total: [K], sum_t a[t, k].
        count: tokens.
    """

    gram: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, relative: Tensor) -> Moments:
        """Moments of a[t, k], [T, K]."""
        a = relative.double()
        return cls(a.t() @ a, a.sum(0), len(a))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.total + other.total, self.count + other.count)

    def error(self, weights: Tensor) -> float:
        """Mean square of the relative error of rms^p under ``weights`` [K]."""
        w = weights.to(self.gram)
        return float((w @ self.gram @ w - 2 * w @ self.total) / self.count + 1)


def check_solver() -> None:
    """Raise a MissingExtraError where scipy is missing, before anything slow has begun."""
    with needs_extra("hf", "mxnorm_pass.calibrate"):
        import scipy.optimize  # noqa: F401


def block_weights(moments: Moments) -> Tensor:
    """The non-negative weights [K], float32, that minimise :meth:`Moments.error`."""
    from scipy.optimize import nnls

    gram, target = moments.gram.cpu(), moments.total.cpu()
    scale = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(gram / scale / scale[:, None])
    # Blocks that always agree make the system singular.
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    # Least squares with as many rows as blocks, whose normal equations are these.
    root, vectors = values[kept].sqrt()[:, None], vectors[:, kept].t()
    rows, right = root * vectors, vectors @ (target / scale) / root[:, 0]
    weights, _ = nnls(rows.numpy(), right.numpy())
    return (torch.from_numpy(weights) / scale).float()
