"""Mark, in Dynamo's graph, the linears whose backward a recipe may cast.

Before::

    x, weight, bias -> linear -> y

After::

    x, weight, bias, seed, key, input_key -> mxnorm_pass.linear -> y

Autograd then differentiates an op that knows its key, so that nobody has to find out which of the
backward's matmuls belong to which linear. The seed is an input of the graph: an op that drew it
could be computed anew for the backward, with another result. Where a layer is checkpointed it is
passed on; bodies that are differentiated by themselves, or not run, keep their linears. Linears
that read one x have the input key of the first of them, so that wgrad casts x once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mxnorm_pass import ops
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.numerics.seed import draw_seed, linear_key
from mxnorm_pass.passes.before_autograd.provenance import example_value
from mxnorm_pass.passes.before_autograd.scopes import Scope
from mxnorm_pass.passes.before_autograd.selective import ask_about_matmuls

_LINEARS = (torch.nn.functional.linear, torch._C._nn.linear)
_OPERANDS = ("input", "weight", "bias")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The linears to mark in each scope.
_Found = list[tuple[Scope, list[fx.Node]]]


@dataclass(frozen=True)
class SeedInput:
    """An input that was added behind those of Dynamo's graph.

    Attributes:
        example: a fake [] int64 tensor.
        device: of what is drawn for a call.
    """

    example: Tensor
    device: torch.device

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Give the compiled graph the signature of Dynamo's: each call draws a seed."""
        return lambda *args: compiled(*args, draw_seed(self.device))


@dataclass(frozen=True)
class UnusedSeed:
    """A draw for a graph that is not differentiated, with which nothing is done.

    A reentrant checkpoint runs one, and later, from the generator's state at that time, the graph
    that is. If the first drew nothing, all checkpoints of all steps would draw from one state.
    """

    device: torch.device

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Have each call draw a seed."""

        def call(*args: Any) -> Any:
            # Known at the call alone: Dynamo compiles outside of inference mode.
            if not torch.is_inference_mode_enabled():
                draw_seed(self.device)
            return compiled(*args)

        return call


def unused_seed(scopes: Sequence[Scope]) -> UnusedSeed | None:
    """The draw of a graph in which :func:`mark_linears` would find something to mark."""
    device = _device_of(_found(scopes))
    return None if device is None else UnusedSeed(device)


def mark_linears(scopes: Sequence[Scope], random: bool, prefix: str = "") -> SeedInput | None:
    """Edit the marks into the scopes' graphs, in place.

    Args:
        random: may a recipe need a seed?
        prefix: of names, which keys leave out: each graph has a seed of its own, and equal layers
            that are compiled on their own share what is compiled.

    Returns:
        The input that the whole has got, if it has got one.
    """
    found = _found(scopes)
    device = _device_of(found)
    if device is None:
        return None
    seed = SeedInput(_example(found), device) if random else None
    calls: dict[str, int] = {}
    seeds: dict[Scope, fx.Node] = {}
    for scope, nodes in found:
        if seed is not None:
            seeds[scope] = _seed_of(scope, seed.example, seeds)
        input_keys: dict[Any, int] = {}
        for node in nodes:
            name = module_path(node).removeprefix(prefix)
            key = linear_key(name, calls.setdefault(name, 0))
            calls[name] += 1
            _mark(node, seeds.get(scope), key, input_keys.setdefault(_operands(node)[0], key))
        ask_about_matmuls(scope.gm)
        scope.gm.recompile()
    return seed


def _found(scopes: Sequence[Scope]) -> _Found:
    return [(scope, _linears(scope)) for scope in scopes if _is_reached(scope)]


def _is_reached(scope: Scope) -> bool:
    """Do its ops end up among those of the whole, once each?"""
    if scope.parent is None:
        return scope.kind == "whole"
    return scope.kind == "inlined" and len(scope.callers) == 1 and _is_reached(scope.parent)


def _linears(scope: Scope) -> list[fx.Node]:
    return [n for n in scope.nodes if n.target in _LINEARS and _is_markable(n)]


def _is_markable(node: fx.Node) -> bool:
    values = [example_value(n) for n in _operands(node)[:2] if isinstance(n, fx.Node)]
    values.append(example_value(node))
    plain = [v for v in values if v is not None and not is_traceable_wrapper_subclass(v)]
    if len(plain) != 3 or any(v.dtype not in _DTYPES for v in plain):
        return False
    return plain[1].ndim == 2 and plain[0].ndim > 0


def _operands(node: fx.Node) -> list[Any]:
    given = dict(zip(_OPERANDS, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in _OPERANDS]


def _device_of(found: _Found) -> torch.device | None:
    values = (example_value(node) for _, nodes in found for node in nodes)
    return next((value.device for value in values if value is not None), None)


def _example(found: _Found) -> Tensor:
    like = next(example_value(nodes[0]) for _, nodes in found if nodes)
    assert isinstance(like, FakeTensor)
    with like.fake_mode:
        return torch.empty((), dtype=torch.int64, device=like.device)


def _seed_of(scope: Scope, example: Tensor, seeds: dict[Scope, fx.Node]) -> fx.Node:
    """The scope's own input of the seed, given to it where it is called."""
    graph = scope.gm.graph
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        seed = graph.placeholder("mxnorm_seed")
    seed.meta["example_value"] = example
    seed._dynamo_source = None
    if scope.parent is not None:
        (caller,) = scope.callers
        caller.args = (*caller.args, seeds[scope.parent])
    return seed


def _mark(node: fx.Node, seed: fx.Node | None, key: int, input_key: int) -> None:
    like = example_value(node)
    assert like is not None
    # Under autocast, which no op of ours knows.
    operands = [_in_dtype(node, operand, like.dtype) for operand in _operands(node)]
    node.target, node.args, node.kwargs = ops.linear, (*operands, seed, key, input_key), {}


def _in_dtype(node: fx.Node, operand: Any, dtype: torch.dtype) -> Any:
    value = example_value(operand) if isinstance(operand, fx.Node) else None
    if value is None or value.dtype == dtype:
        return operand
    with node.graph.inserting_before(node):
        cast = node.graph.call_method("to", (operand, dtype))
    with value.fake_mode:  # type: ignore[attr-defined]
        cast.meta = {**node.meta, "example_value": value.to(dtype)}
    return cast
