"""What the matmuls of linears read where a recipe was asked for, or why they do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class LinearCasts:
    """A linear, and what its three matmuls read.

    Attributes:
        name: dotted module name.
        forward, dgrad, wgrad: as text, such as "mxfp4 e2m1 floor block 32 stochastic, Hadamard
            64"; the backward's are "" in a graph without one.
        reason: why all of it is in high precision although there is a recipe; "" where it is not.
    """

    name: str
    forward: str
    dgrad: str = ""
    wgrad: str = ""
    reason: str = ""

    @property
    def how(self) -> str:
        """What it reads, or why it does not read it, as one text."""
        if self.reason:
            return f"high precision: {self.reason}"
        if not self.dgrad:
            return f"forward {self.forward}"
        return f"forward {self.forward}; dgrad {self.dgrad}; wgrad {self.wgrad}"


def linear_lines(linears: Iterable[LinearCasts]) -> Iterator[str]:
    """A line for all that are treated alike, with ``*`` for numbers of layers."""
    by_treatment: dict[str, list[str]] = {}
    for linear in linears:
        by_treatment.setdefault(linear.how, []).append(linear.name)
    for how, names in by_treatment.items():
        shown = dict.fromkeys(_NUMBER.sub("*", name) for name in names)
        count = f"{len(names)} linear{'' if len(names) == 1 else 's'}"
        yield f"recipe   {count}: {', '.join(shown)}\n         {how}"
