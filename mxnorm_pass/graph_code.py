"""Print a graph as code for people: one call per line, typed, under the module that made it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._dtype_abbrs import dtype_abbrs

from mxnorm_pass.graph_utils import is_backward
from mxnorm_pass.module_names import module_path


def graph_code(graph: fx.Graph) -> str:
    """The graph as Python, such as ``rsqrt: "f32[2, 16, 1]" = torch.ops.aten.rsqrt.default(add)``.

    A comment names the module, and the pass (forward or backward), of the lines below it.
    """
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    lines = [f"def forward({', '.join(inputs)}):"]
    origin = ""
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"    # {node.name}: {type_name(node)}")
            continue
        if node.op != "output":
            new_origin = f"{module_path(node)}{' (backward)' if is_backward(node) else ''}"
            if new_origin != origin:
                origin = new_origin
                lines.append(f"    # {origin or '-'}")
        lines.append(f"    {_statement(node)}")
    return "\n".join(lines) + "\n"


def _statement(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    if node.op == "get_attr":
        return f"{node.name}{_annotation(node)} = self.{node.target}"
    arguments = [_text(a) for a in node.args]
    arguments += [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"{node.name}{_annotation(node)} = {_target(node.target)}({', '.join(arguments)})"


@cache
def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    return str(getattr(target, "__name__", target))


def _annotation(node: fx.Node) -> str:
    kind = type_name(node)
    return f': "{kind}"' if kind else ""


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
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"{dtype_abbrs[value.dtype]}{list(value.shape)}"
    return ""


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (int, float, str)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, (torch.dtype, torch.device)) or value is None:
        return str(value)
    return repr(value)
