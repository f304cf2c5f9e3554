"""Where a module is in the depth of a model, and what a recipe leaves in high precision there.

A stack holds layers under numbers from 0 on, as ``model.layers`` does. That each of them has a norm
of the same name tells it from experts, heads and parts of a sequence, which are numbered, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mxnorm_pass.numerics.recipe import Recipe


@dataclass(frozen=True)
class Place:
    """Of a module in a stack of layers.

    Attributes:
        stack: dotted name of what holds the layers.
        index: of the layer, from 0 on.
        count: number of layers.
        inside: the rest of the module's name.
    """

    stack: str
    index: int
    count: int
    inside: tuple[str, ...]

    def in_every_layer(self) -> Iterator[str]:
        """The module's name in each layer of the stack."""
        stack = self.stack.split(".") if self.stack else []
        return (".".join((*stack, str(i), *self.inside)) for i in range(self.count))


def place_of(name: str, num_layers: Mapping[str, int]) -> Place | None:
    """In the outermost stack that the name leads through; None outside of all."""
    for stack, index, inside in _numbers_in(name):
        if index < num_layers.get(stack, 0):
            return Place(stack, index, num_layers[stack], inside)
    return None


def has_number(name: str) -> bool:
    """Is a module of that name in anything numbered?"""
    return any(_numbers_in(name))


def kept_by_depth(place: Place, recipe: Recipe) -> str:
    """Why the recipe leaves a linear there in high precision, as words after "a linear", or ""."""
    first = recipe.layers_of(recipe.high_precision_first, place.count)
    last = recipe.layers_of(recipe.high_precision_last, place.count)
    if place.index < first:
        which = f"first {first}" if first > 1 else "first"
    elif place.index >= place.count - last:
        which = f"last {last}" if last > 1 else "last"
    else:
        return ""
    layers = f"{place.count} layers" + (f" of {place.stack}" if place.stack else "")
    return f"in the {which} of the {layers}, which its recipe leaves in high precision"


def find_stacks(kinds: Mapping[str, str], prefix: str = "") -> dict[str, int]:
    """The number of layers of each stack.

    Args:
        kinds: the class name of every module, by full dotted name.
        prefix: the module that they are in. In a layer of a stack, whose others are out of sight,
            nothing is found.
    """
    if has_number(prefix):
        return {}
    norms: dict[str, dict[int, set[tuple[str, ...]]]] = {}
    for name, kind in kinds.items():
        for stack, index, inside in _numbers_in(name):
            of_layer = norms.setdefault(stack, {}).setdefault(index, set())
            if inside and "norm" in kind.lower():
                of_layer.add(inside)
    return {
        stack: len(layers)
        for stack, layers in norms.items()
        if layers.keys() == set(range(len(layers))) and set.intersection(*layers.values())
    }


def _numbers_in(name: str) -> Iterable[tuple[str, int, tuple[str, ...]]]:
    """What is in front of each number of a name, the number, and what is behind it."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:i]), int(part), tuple(parts[i + 1 :])
