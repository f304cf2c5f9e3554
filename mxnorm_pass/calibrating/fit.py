"""Non-negative block weights by least squares, from sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def block_weights(moments: Moments) -> Tensor:
    """The non-negative weights [K], float32, that minimise :meth:`Moments.error`.

    Lawson & Hanson's active-set method (Solving Least Squares Problems, 1974, chapter 23) in the
    form that needs the normal equations alone (Bro & de Jong, J. Chemometrics 11, 1997).
    """
    gram, target = moments.gram.cpu(), moments.total.cpu()
    scale = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    gram, target = gram / scale / scale[:, None], target / scale
    tolerance = 1e-10 * float(target.abs().max())
    weights = torch.zeros_like(target)
    free = torch.zeros_like(target, dtype=torch.bool)
    for _ in range(3 * len(target)):
        gradient = (target - gram @ weights).masked_fill(free, -torch.inf)
        best = int(gradient.argmax())
        if gradient[best] <= tolerance:
            break
        free[best] = True
        weights = _to_feasible(gram, target, weights, free)
    return (weights / scale).float()


def _to_feasible(gram: Tensor, target: Tensor, weights: Tensor, free: Tensor) -> Tensor:
    """Minimise over the free weights; those that would turn negative leave ``free``, in place."""
    while True:
        solution = _solve(gram, target, free)
        negative = free & (solution <= 0)
        if not negative.any():
            return solution
        steps = weights[negative] / (weights[negative] - solution[negative])
        step = steps.min()
        weights = weights + step * (solution - weights)
        index = torch.nonzero(negative).flatten()
        weights[index[steps <= step]] = 0.0
        free &= weights > 0


def _solve(gram: Tensor, target: Tensor, free: Tensor) -> Tensor:
    index = torch.nonzero(free).flatten()
    solution = torch.zeros_like(target)
    # Blocks that always agree make the system singular; lstsq takes the shortest solution.
    system = gram[index][:, index]
    solution[index] = torch.linalg.lstsq(system, target[index, None], driver="gelsd").solution[:, 0]
    return solution
