"""Print nodes as code for people: one typed call per line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._dtype_abbrs import dtype_abbrs


def statement(node: fx.Node, op: str, kind: str) -> str:
    """The node as Python, such as ``rsqrt: "f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add)``.

    Args:
        op: its :func:`op_name`.
        kind: its :func:`type_name`.
    """
    if node.op == "placeholder":
        return f"# {node.name}: {kind}"
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    name = f'{node.name}: "{kind}"' if kind else node.name
    if node.op == "get_attr":
        return f"{name} = self.{node.target}"
    function = f"torch.ops.{op}" if isinstance(node.target, torch._ops.OpOverload) else op
    arguments = [a.name if isinstance(a, fx.Node) else _text(a) for a in node.args]
    if node.kwargs:
        arguments += [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"{name} = {function}({', '.join(arguments)})"


def op_name(node: fx.Node) -> str:
    """ "aten.mm.default"; "placeholder" and the like where nothing is called."""
    return _op_name(node.target) if node.op == "call_function" else node.op


@cache
def _op_name(target: Any) -> str:
    return str(target) if hasattr(target, "_schema") else str(target.__name__)


def call_text(node: fx.Node) -> str:
    """A node for people: op or kind of input, and type, "aten.add.Tensor bf16[2, 16, 256]"."""
    name = op_name(node) if node.op == "call_function" else f"{node.op} {node.name}"
    return f"{name} {type_name(node)}".rstrip()


def type_name(node: fx.Node) -> str:
    """ "bf16[2, 16, 64]"; "" where the value is no single tensor."""
    return value_type(node.meta.get("val")).name


@dataclass(frozen=True)
class ValueType:
    """What is said of a value.

    Attributes:
        name: "bf16[2, 16, 64]"; "" where the value is no single tensor.
        bytes: of all its tensors; None where a size is symbolic and has no hint.
    """

    name: str
    bytes: int | None


def value_type(value: Any) -> ValueType:
    """Of the value of a node, its ``meta["val"]``."""
    if isinstance(value, Tensor):
        try:
            return _tensor_type(value.dtype, value.shape)
        except TypeError:  # Symbolic sizes have no hash.
            return _tensor_type.__wrapped__(value.dtype, value.shape)
    if isinstance(value, (tuple, list)):
        return ValueType("", add_bytes([value_type(item).bytes for item in value]))
    return ValueType("", 0)


@lru_cache(maxsize=4096)
def _tensor_type(dtype: torch.dtype, shape: torch.Size) -> ValueType:
    name = f"{dtype_abbrs[dtype]}{list(shape)}"
    sizes = [size if isinstance(size, int) else _hint(size) for size in shape]
    return ValueType(name, None if None in sizes else math.prod(sizes, start=dtype.itemsize))


def _hint(size: Any) -> int | None:
    """The size with which the graph was traced; asking for it adds no guard."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return hint if isinstance(hint, int) else None


def add_bytes(terms: Iterable[int | None]) -> int | None:
    """The sum; None where a term is None, that is unknown."""
    known = list(terms)
    return None if None in known else sum(known)  # type: ignore[arg-type]


def _text(value: Any) -> str:
    plain = _PLAIN.get(type(value))
    if plain is not None:
        return plain(value)
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


_PLAIN: dict[type, Callable[[Any], str]] = {
    **dict.fromkeys((int, float, str, bool), repr),
    **dict.fromkeys((torch.dtype, torch.device, type(None)), str),
}
