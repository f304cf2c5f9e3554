"""Ways in which code reaches modules, each with the names that its norms should have.

A way builds what is called and its arguments; one norm of it is turned off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Options = dict[str, Any]
Built = tuple[Callable[..., Any], tuple[Any, ...]]
Builder = Callable[[Options], Built]

BLOCKS = ("first.norm", "second.norm")
POLICY = ("policy.norm", "reference.norm")


@dataclass(frozen=True)
class Way:
    """One way; ``off`` is the one norm that ``modules`` turns off, ``names`` are all."""

    build: Builder
    names: tuple[str, ...]
    off: str


def register(
    ways: dict[str, Way], names: tuple[str, ...], off: str
) -> Callable[[Builder], Builder]:
    def note(build: Builder) -> Builder:
        ways[build.__name__] = Way(build, names, off)
        return build

    return note


def x() -> Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def compiled(function: Any, options: Options, **arguments: Any) -> Any:
    return torch.compile(function, backend="mxnorm", options=options, **arguments)


class Block(nn.Module):
    """A norm and its linear; ``breaks`` behind them."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return y * 2


class LateBlock(Block):
    """Breaks in front of its norm."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.linear(self.norm(x))


class Pair(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


LAYERS = ("layers.0.norm", "layers.1.norm")


def breaking() -> Block:
    return Block(breaks=True)


def logged(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def unnamed(function: Any) -> Any:
    """A decorator that does not say what it decorates."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper
