"""What the matmuls of linears read where a recipe was asked for, or why they do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mxnorm_pass.report.numbers import number_set

# Left in high precision by its place in the depth, or cast since that is not known.
Depth = Literal["", "kept", "unknown"]
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


@dataclass(frozen=True)
class LinearCasts:
    """A linear, and what its three matmuls read.

    Attributes:
        name: dotted module name.
        forward, dgrad, wgrad: as text, such as "mxfp4 e2m1 floor block 32 stochastic, Hadamard
            64"; the backward's are "" in a graph without one.
        reason: why all of it is in high precision although there is a recipe; "" where it is not.
        depth: what the recipe does by the layer's place in the depth of the model: "kept" in high
            precision; "unknown" where it might, but the number of layers is not known; or "".
    """

    name: str
    forward: str
    dgrad: str = ""
    wgrad: str = ""
    reason: str = ""
    depth: Depth = ""

    @property
    def how(self) -> str:
        """What it reads, or why it does not read it, as one text."""
        if self.reason:
            return f"high precision: {self.reason}"
        backward = f"; dgrad {self.dgrad}; wgrad {self.wgrad}" if self.dgrad else ""
        return f"forward {self.forward}{backward}{self.depth_note}"

    @property
    def depth_note(self) -> str:
        """Behind what it reads, where its place in the depth should have decided on that."""
        return "; in every layer, as their number is not known" if self.depth == "unknown" else ""


def linear_lines(linears: Iterable[LinearCasts]) -> Iterator[str]:
    """A line for all that are treated alike, with the numbers of their layers in braces."""
    by_treatment: dict[str, list[str]] = {}
    for linear in linears:
        by_treatment.setdefault(linear.how, []).append(linear.name)
    for how, names in by_treatment.items():
        shown = _folded(names)
        count = f"{len(names)} linear{'' if len(names) == 1 else 's'}"
        yield f"recipe   {count}: {', '.join(shown)}\n         {how}"


def _folded(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in the first number alone as one, with ``*`` for those further inside."""
    layers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        number = _NUMBER.search(name)
        if number is None:
            layers[name, ""] = set()
            continue
        inside = _NUMBER.sub("*", name[number.end() :])
        layers.setdefault((name[: number.start()], inside), set()).add(int(number[0]))
    for (stack, inside), numbers in layers.items():
        text = number_set(numbers)
        yield f"{stack}{f'{{{text}}}' if len(numbers) > 1 else text}{inside}"
