"""What a conversion did, as data and text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mxnorm_pass.report.numbers import number_set

# A linear that is the whole model has no name.
_ROOT = "the model itself"


@dataclass(frozen=True)
class Conversion:
    """Which linears of a model were converted. ``str()`` has equal layers in one line.

    Attributes:
        converted: their names, in the order of ``named_modules()``.
        left: name -> reason, of the ``nn.Linear`` that stayed as they were.
        bytes_before, bytes_after: of all parameters and buffers.
    """

    converted: tuple[str, ...]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = f"{_megabytes(self.bytes_before)} -> {_megabytes(self.bytes_after)}"
        total = len(self.converted) + len(self.left)
        lines = [f"mxnorm: {len(self.converted)} of {total} linears converted, {sizes}"]
        lines += [f"  converted  {name or _ROOT}" for name in _folded(self.converted)]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            lines += [f"  left       {name or _ROOT}: {reason}" for name in _folded(names)]
        return "\n".join(lines)


def size_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(map(_bytes, chain(model.parameters(), model.buffers())))


def _bytes(tensor: Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    parts, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, part)) for part in parts)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _folded(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in their last part alone as one: ``layers.{0..31}.mlp.{gate, up}``."""
    groups: dict[str, list[str]] = {}
    for name in _without_numbers(names):
        parent, _, child = name.rpartition(".")
        groups.setdefault(parent, []).append(child)
    for parent, children in groups.items():
        last = children[0] if len(children) == 1 else f"{{{', '.join(children)}}}"
        yield f"{parent}.{last}" if parent else last


def _without_numbers(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in numbers alone as one, where all combinations are there."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join("#" if p.isdigit() else p for p in parts), []).append(parts)
    for members in groups.values():
        columns = [list(dict.fromkeys(column)) for column in zip(*members, strict=True)]
        if math.prod(map(len, columns)) == len(members):
            yield ".".join(map(_alternatives, columns))
        else:
            yield from map(".".join, members)


def _alternatives(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{{{number_set(map(int, parts))}}}"
