"""Evaluate one number per row on a fixed probe of rows and name what it is of the row's norm.

A number that does not change as the row is turned is a function of the row's 2-norm alone. The
probe turns rows of every magnitude, and none, into several directions; as a function of
rms = norm / sqrt(D) the outcome is compared with the ways in which RMSNorms guard the division.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise, takewhile
from typing import Literal

import torch
from torch import Tensor

from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.passes.match.norms.row_program import RowProgram

Guard = Literal["added", "clamped", "outside", "other"]
_GUARDED: dict[Guard, Callable[[Tensor, float], Tensor]] = {
    "added": lambda rms, eps: (rms * rms + eps).sqrt(),
    "clamped": lambda rms, eps: rms.clamp(min=eps),
    "outside": lambda rms, eps: rms + eps,
}
# Far more than sums of squares in float64 differ by, and as many digits as float32 has.
_TOLERANCE = 1e-8
# A wider row is no row of channels.
_MAX_WIDTH = 1 << 16
# Magnitudes of rows: thresholds lie between two of them.
_EXPONENTS = range(-64, 65, 2)
# By which powers of the norm a row may be divided, and between how many magnitudes.
_SLOPES = (0.1, 4.0)
_LEAST_STEPS = 4


@dataclass(frozen=True)
class InverseNorm:
    """A number per row that falls with the row's norm: factor / rms, but for small rows.

    Attributes:
        guard: what stands in the place of rms: sqrt(rms^2 + eps) where it is "added",
            max(rms, eps) where "clamped", rms + eps where "outside"; "other" is none of them, and
            has neither factor nor eps.
    """

    guard: Guard
    factor: float = 1.0
    eps: float = 0.0


def inverse_norm(program: RowProgram, divides: bool, centered: bool = False) -> InverseNorm | None:
    """What the program's number is of its row's norm; None if no inverse norm.

    Args:
        divides: the row is divided by the number, not multiplied.
        centered: of what is left of the row without its mean, which must not count.
    """
    if not 2 <= program.width <= _MAX_WIDTH:
        return None
    return _inverse_norm(program, divides, centered)


@lru_cache(maxsize=256)
def _inverse_norm(program: RowProgram, divides: bool, centered: bool) -> InverseNorm | None:
    with real_tensors():
        directions = _directions(program.width, centered)
        largest = torch.tensor([2.0**e for e in _EXPONENTS[-2:]], dtype=torch.float64)
        # Most candidates are no function of the norm, which a few rows show.
        if _multipliers(program, largest, directions, divides) is None:
            return None
        magnitudes = torch.tensor([0.0, *(2.0**e for e in _EXPONENTS)], dtype=torch.float64)
        multipliers = _multipliers(program, magnitudes, directions, divides)
        if multipliers is None or (centered and not _ignores_the_mean(program, directions)):
            return None
        return _classify(magnitudes, multipliers)


def _directions(width: int, centered: bool) -> Tensor:
    """[N, D] rows of RMS 1: random ones, a ramp, one of two values, and one element alone."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, width, dtype=torch.float64, generator=generator)
    ramp = torch.linspace(-1, 2, width, dtype=torch.float64)[None]
    single = torch.zeros(1, width, dtype=torch.float64)
    single[0, width // 2] = -1.0
    signs = torch.ones(1, width, dtype=torch.float64)
    signs[0, : (width + 1) // 2] = -1.0 if centered else 1.0
    rows = torch.cat([random, ramp, single, signs])
    if centered:
        rows = rows - rows.mean(-1, keepdim=True)
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def _multipliers(
    program: RowProgram, magnitudes: Tensor, directions: Tensor, divides: bool
) -> Tensor | None:
    """[M] by which rows of each magnitude are multiplied; None where the direction counts."""
    rows = (magnitudes[:, None, None] * directions).flatten(0, 1)
    numbers, alone = _run(program, rows), _run(program, rows[::3])
    if numbers is None or alone is None or not _close(numbers[::3], alone):
        return None
    if divides:
        numbers = 1 / numbers
    numbers = numbers.reshape(len(magnitudes), len(directions))
    first = numbers[:, :1]
    return first[:, 0] if _close(numbers, first.expand_as(numbers)) else None


def _ignores_the_mean(program: RowProgram, rows: Tensor) -> bool:
    numbers, shifted = _run(program, rows), _run(program, rows + 0.5)
    return numbers is not None and shifted is not None and _close(numbers, shifted)


def _run(program: RowProgram, rows: Tensor) -> Tensor | None:
    try:
        return program(rows)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=0.0, equal_nan=True)


def _classify(rms: Tensor, multipliers: Tensor) -> InverseNorm | None:
    """Name the function whose values on the probe's magnitudes are ``multipliers``."""
    if not _falls(multipliers[1:].tolist()):
        return None
    factor = float(multipliers[-1] * rms[-1])
    guarded = factor / multipliers
    for guard, function in _GUARDED.items():
        # What guards the division is all that a row of zeros sees.
        seen = float(guarded[0])
        eps = _spelled(seen * seen if guard == "added" else seen)
        if _close(guarded, function(rms, eps)):
            return InverseNorm(guard, _spelled(factor), eps)
    return InverseNorm("other")


def _falls(multipliers: Sequence[float]) -> bool:
    """Do they fall as a power of the magnitude for a while? Exponentials, such as gates, do not."""
    sizes = list(map(abs, multipliers))
    regular = list(takewhile(lambda size: 0 < size < math.inf, reversed(sizes)))
    step = _EXPONENTS[1] - _EXPONENTS[0]
    slopes = [math.log2(b / a) / step for a, b in pairwise(regular)]
    least, most = _SLOPES
    falling = [slope >= least for slope in slopes]
    runs = (sum(1 for _ in run) for falls, run in groupby(falling) if falls)
    return max(runs, default=0) >= _LEAST_STEPS and max(slopes) <= most


def _spelled(number: float) -> float:
    """The decimal number that evaluation has blurred."""
    return float(f"{number:.9g}")
