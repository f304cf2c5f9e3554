"""Graphs as Python text, and back: one assignment per node, with all that matching reads of it.

::

    def graph(
        primals_1: "bf16[2, 16, 128]",
    ):
        # norm
        pow_1: "f32[2, 16, 128]" = torch.ops.aten.pow.Tensor_Scalar(primals_1, 2)  # 3
        # norm (backward)

An annotation is the node's fake value, "cuda " in front of it and its strides behind it where they
are not the usual ones. The comment above a node names its module, and the one behind it is the
number that autograd gave to its op. The text is Python: with real tensors it runs.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._dtype_abbrs import dtype_abbrs

from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import is_backward

HEADER = """\
import operator

import torch
from torch import device, inf, nan

"""
# What is run to get a rebuilt node's fake value; of any other op only the annotation is taken.
_EVALUATED = ("aten", "prims", "higher_order")
_DTYPES = {name: dtype for dtype, name in dtype_abbrs.items()}


class MissingOp(Exception):
    """The installed torch does not have an op of the graph, or not with these arguments."""


# Graph to text


def to_text(graph: fx.Graph, title: str, device: str = "cpu") -> str:
    """Print a graph; ``device`` takes the place of the CPU on which it was traced."""
    return _Printer(graph, device).text(title)


class _Printer:
    def __init__(self, graph: fx.Graph, device: str) -> None:
        self.graph = graph
        self.device = torch.device(device)
        self.names = _names(graph)
        # Absolute numbers depend on what was traced before; without a backward they say nothing.
        numbers = map(_seq_nr, graph.nodes) if any(map(is_backward, graph.nodes)) else ()
        self.numbers = {n: i for i, n in enumerate(dict.fromkeys(numbers)) if n is not None}

    def text(self, title: str) -> str:
        schemas = sorted(set(filter(None, map(_custom_schema, self.graph.nodes))))
        lines = [
            "# ruff: noqa",
            "# fmt: off",
            f'"""{title}"""',
            HEADER + f"SCHEMAS = {schemas!r}\n\n",
            "def graph(",
        ]
        inputs = self.graph.find_nodes(op="placeholder")
        lines += [f'    {self.names[n]}: "{self.kind(n.meta["val"])}",' for n in inputs]
        lines += ["):", *self.body()]
        return "\n".join(lines) + "\n"

    def body(self) -> Iterator[str]:
        section = None
        for node in self.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                own = f"{module_path(node) or '-'}{' (backward)' if is_backward(node) else ''}"
                if own != section:
                    section = own
                    yield f"    # {section}"
                yield f"    {self.statement(node)}"
            elif node.op == "output":
                yield f"    return {self.value(node.args[0])}"

    def statement(self, node: fx.Node) -> str:
        kind = self.kind(node.meta.get("val"))
        name = self.names[node] + (f': "{kind}"' if kind else "")
        if node.op == "get_attr":
            constant = getattr(self.graph.owning_module, str(node.target))
            return f"{name} = torch.tensor({constant.item()!r}, dtype={constant.dtype})"
        arguments = [self.value(a) for a in node.args]
        arguments += [self.argument(k, v) for k, v in sorted(node.kwargs.items())]
        number = self.numbers.get(_seq_nr(node))
        comment = "" if number is None else f"  # {number}"
        return f"{name} = {_target(node)}({', '.join(arguments)}){comment}"

    def kind(self, value: Any) -> str:
        if isinstance(value, Tensor):
            on = "" if self.device_of(value.device).type == "cpu" else "cuda "
            strides = "" if value.is_contiguous() else f" {tuple(value.stride())}"
            return f"{on}{dtype_abbrs[value.dtype]}{list(value.shape)}{strides}"
        if isinstance(value, (tuple, list)):
            return "; ".join(map(self.kind, value))
        return ""

    def argument(self, name: str, value: Any) -> str:
        """A keyword argument; indices into the table of Triton kernels by what they stand for."""
        if name == "kernel_idx":
            kernel = kernel_side_table.get_kernel(value)
            return f"{name}=kernel({getattr(kernel, 'fn', kernel).__name__!r})"
        if name == "constant_args_idx":
            arguments = kernel_side_table.get_constant_args(value)
            return f"{name}=constants({self.value(dict(sorted(arguments.items())))})"
        return f"{name}={self.value(value)}"

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            items = ", ".join(map(self.value, value))
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, dict):
            items = ", ".join(f"{k!r}: {self.value(v)}" for k, v in value.items())
            return f"{{{items}}}"
        if isinstance(value, torch.device):
            return repr(self.device_of(value))
        return repr(value)

    def device_of(self, device: torch.device) -> torch.device:
        return self.device if device.type == "cpu" else device


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Names that do not depend on what else was traced."""
    names: dict[fx.Node, str] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            base = node.target.__name__.split(".")[0]
            counts[base] = counts.get(base, 0) + 1
            names[node] = f"{base}_{counts[base]}"
        else:
            names[node] = node.name
    return names


def _seq_nr(node: fx.Node) -> int | None:
    return node.meta.get("seq_nr")


def _target(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "operator.getitem"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{node.target.__name__}"
    assert isinstance(node.target, torch._ops.OpOverload), node.format_node()
    return f"torch.ops.{node.target}"


def _custom_schema(node: fx.Node) -> str | None:
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in _EVALUATED:
            return str(node.target._schema)
    return None


# Text to graph


def rebuild(text: str, library: torch.library.Library | None = None) -> fx.GraphModule:
    """The graph that a text describes, with fake tensors.

    Args:
        library: where custom ops are defined that the installed packages do not register.

    Raises:
        MissingOp: the graph calls an ATen or higher-order op that this torch does not have.
    """
    return _Builder(text, library).module()


@dataclass
class _Builder:
    source: str
    library: torch.library.Library | None
    graph: fx.Graph = field(default_factory=fx.Graph)
    mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    env: dict[str, fx.Node] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    section: str = "-"

    def module(self) -> fx.GraphModule:
        tree = ast.parse(self.source)
        (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef))
        (schemas,) = (n for n in tree.body if isinstance(n, ast.Assign))
        for schema in ast.literal_eval(schemas.value):
            self.define(schema)
        for argument in function.args.args:
            assert isinstance(argument.annotation, ast.Constant)
            self.placeholder(argument.arg, argument.annotation.value)
        # Comments are no part of the tree.
        for line in self.source.splitlines()[function.args.args[-1].lineno + 1 :]:
            self.line(line.strip())
        module = fx.GraphModule(self.constants, self.graph)
        module.graph.lint()
        return module

    def define(self, schema: str) -> None:
        if not _is_registered(schema):
            assert self.library is not None, f"{schema} is not registered"
            self.library.define(schema.split("::", 1)[1])

    def placeholder(self, name: str, kind: str) -> None:
        node = self.graph.placeholder(name)
        node.meta["val"] = _fake(kind, self.mode)
        self.env[name] = node

    def line(self, line: str) -> None:
        if line.startswith("# "):
            self.section = line[2:]
        elif line.startswith("return "):
            self.graph.output(self.evaluate(ast.parse(line[7:], mode="eval").body))
        elif line:
            (statement,) = ast.parse(line).body
            number = re.search(r"  # (\d+)$", line)
            self.statement(statement, int(number[1]) if number else None)

    def statement(self, statement: ast.stmt, number: int | None) -> None:
        kind = ""
        if isinstance(statement, ast.AnnAssign):
            kind, name = ast.literal_eval(statement.annotation), statement.target
        else:
            assert isinstance(statement, ast.Assign)
            (name,) = statement.targets
        assert isinstance(name, ast.Name) and isinstance(statement.value, ast.Call)
        self.env[name.id] = node = self.call(name.id, statement.value)
        node.meta["val"] = self.fake_value(node, kind)
        node.meta.update(self.origin())
        if number is not None:
            node.meta["seq_nr"] = number

    def call(self, name: str, call: ast.Call) -> fx.Node:
        target = ast.unparse(call.func)
        args = tuple(map(self.evaluate, call.args))
        kwargs = {str(k.arg): self.evaluate(k.value) for k in call.keywords}
        if target == "torch.tensor":
            self.constants[name] = torch.tensor(*args, **kwargs)
            return self.graph.create_node("get_attr", name, name=name)
        return self.graph.create_node("call_function", _op(target), args, kwargs, name=name)

    def evaluate(self, expression: ast.expr) -> Any:
        code = compile(ast.Expression(expression), "<golden graph>", "eval")
        return eval(code, {**_NAMESPACE, **self.env})

    def fake_value(self, node: fx.Node, kind: str) -> Any:
        if node.op == "get_attr":
            return self.mode.from_tensor(self.constants[str(node.target)])
        if getattr(node.target, "namespace", "aten") not in _EVALUATED:
            return _fake(kind, self.mode)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with self.mode, torch.no_grad():
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        except TypeError as error:
            raise MissingOp(f"such {node.target}: {error}") from None
        if kind:
            assert _describe(value) == _describe(_fake(kind, self.mode)), (str(node), kind, value)
        return value

    def origin(self) -> dict[str, Any]:
        module, _, direction = self.section.partition(" ")
        backward = direction == "(backward)"
        origin: dict[str, Any] = {
            "partitioner_tag": "is_backward" if backward else "is_forward",
        }
        if module != "-":
            key = "fwd_nn_module_stack" if backward else "nn_module_stack"
            origin[key] = {module: (module, torch.nn.Module)}
        return origin


def _is_registered(schema: str) -> bool:
    name, overload = re.match(r"(\w+::\w+)(?:\.(\w+))?\(", schema).groups()  # type: ignore[union-attr]
    try:
        torch._C._get_schema(name, overload or "")
    except RuntimeError:
        return False
    return True


def _op(path: str) -> Any:
    if path == "operator.getitem":
        return operator.getitem
    _, _, namespace, *names = path.split(".")
    if namespace == "higher_order":
        with contextlib.suppress(ImportError):
            # Higher-order ops exist once their module is imported.
            importlib.import_module(f"torch._higher_order_ops.{names[0]}")
    try:
        return operator.attrgetter(path.removeprefix("torch."))(torch)
    except AttributeError:
        raise MissingOp(path) from None


def _fake(kind: str, mode: FakeTensorMode) -> Any:
    with mode:
        values = tuple(map(_empty, kind.split("; ")))
    return values[0] if len(values) == 1 else values


def _empty(kind: str) -> Tensor:
    match = re.fullmatch(r"(cuda )?(\w+)\[(.*?)\](?: \((.*)\))?", kind)
    assert match, kind
    device, dtype, shape, strides = match.groups()
    sizes = ast.literal_eval(f"[{shape}]")
    options = {"dtype": _DTYPES[dtype], "device": "cuda:0" if device else "cpu"}
    if strides is None:
        return torch.empty(sizes, **options)
    return torch.empty_strided(sizes, ast.literal_eval(f"[{strides}]"), **options)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Dimensions of one element have whatever stride.
        strides = () if value.is_contiguous() else tuple(value.stride())
        return tuple(value.shape), strides, value.dtype, value.device
    return tuple(map(_describe, value))


class _Kernel:
    """Stands for a Triton kernel: of the real one a graph has no more than an index."""

    def __init__(self, name: str) -> None:
        self.__name__ = name


_NAMESPACE = {
    "torch": torch,
    "device": torch.device,
    "inf": math.inf,
    "nan": math.nan,
    "kernel": lambda name: kernel_side_table.add_kernel(_Kernel(name)),
    "constants": kernel_side_table.add_constant_args,
}
