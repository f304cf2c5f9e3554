"""The fake values of nodes: how a new node gets one."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    FakeTensor,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import snapshot_fake
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def real_tensors() -> Iterator[None]:
    """Leave the fake mode under which graphs are compiled."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        yield


def signature(arg: Any) -> Any:
    value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    if isinstance(value, Tensor):
        # Sizes may be symbolic, which must not be compared: that would add guards.
        return (value.dtype, value.device, *map(_size, value.shape), *map(_size, value.stride()))
    if isinstance(value, (tuple, list)):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((k, signature(v)) for k, v in value.items())
    return (type(value).__name__, value if isinstance(value, (int, float)) else str(value))


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else str(size)


def fake_mode(*nodes: fx.Node) -> Any:
    for node in nodes:
        for value in tensors(node.meta.get("val")):
            mode = getattr(value, "fake_mode", None)
            if mode is not None:
                return mode
    raise AssertionError(f"no fake tensor among {nodes}")


def tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Tensor):
        yield value


def run_fake(node: fx.Node, mode: Any) -> None:
    if node.target is operator.getitem:
        node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
        return
    if _may_alias(node.target):
        node.meta["val"] = _evaluate(node, mode)
        return
    # The layers of a model repeat the same calls; dispatching each to fake tensors would be most
    # of the pass's time.
    templates = _templates.setdefault(mode, {})
    key = (node.target, signature(node.args), signature(node.kwargs))
    if key in templates:
        node.meta["val"] = pytree.tree_map_only(Tensor, partial(_fresh, mode), templates[key])
    else:
        node.meta["val"] = templates[key] = _evaluate(node, mode)


_templates: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _may_alias(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def _evaluate(node: fx.Node, mode: Any) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode, torch.no_grad():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    # As in traced graphs: a fake tensor that is autograd's view of another cannot be pickled.
    return pytree.tree_map_only(FakeTensor, snapshot_fake, value)


def _fresh(mode: Any, like: Tensor) -> Tensor:
    """A fake tensor like ``like`` with a storage of its own: storages tell what aliases what."""
    with in_kernel_invocation_manager(mode):
        meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return FakeTensor(mode, meta, like.device)
