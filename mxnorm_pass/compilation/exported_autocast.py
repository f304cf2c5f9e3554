"""The autocast around ``torch.export.export``, of which a program keeps nothing but its dtypes.

An autocast region inside the model is part of the program. One around the export is not: the ops
stand in the graph as the model called them, and the program runs only under the same autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.graph.trace import without_autocast

_REDUCED = (torch.bfloat16, torch.float16)
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def as_exported(module: fx.GraphModule) -> ExitStack:
    """A context with the autocast under which the program was exported, and no other."""
    found = exported_autocast(module)
    devices = {value.device.type for _, value in _results(module)}
    stack = without_autocast(devices - found.keys())
    for device, dtype in found.items():
        # The cache would hand tensors of a trace to what runs later.
        stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
    return stack


def exported_autocast(module: fx.GraphModule) -> dict[str, torch.dtype]:
    """The dtype of the autocast around the export, by device type; none where none shows.

    It shows in ops that give another dtype than the program notes, or that cannot run at all.
    """
    found: dict[str, torch.dtype] = {}
    for node, value in _results(module):
        device = value.device.type
        if found.get(device) in _REDUCED or not _may_be_autocast(node, device):
            continue
        without = _dtype_without_autocast(node, value)
        if without != value.dtype and value.dtype in _REDUCED:
            found[device] = value.dtype
        elif without not in (value.dtype, None):
            # What autocast runs in float32 does not tell in which dtype it runs the rest.
            found[device] = torch.get_autocast_dtype(device)
    return found


def _results(module: fx.GraphModule) -> Iterator[tuple[fx.Node, FakeTensor]]:
    """The calls outside of autocast regions, and the tensors that they gave."""
    for node in module.graph.nodes:
        value = tensor_of(node)
        if node.op == "call_function" and isinstance(value, FakeTensor):
            yield node, value
        for body in _bodies(module, node):
            yield from _results(body)


def _bodies(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """What a higher-order op other than an autocast region runs."""
    if not isinstance(node.target, HigherOrderOperator) or "autocast" in str(node.target):
        return []
    names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    children = [m for name, m in module.named_children() if name in names]
    return [m for m in children if isinstance(m, fx.GraphModule)]


def _may_be_autocast(node: fx.Node, device: str) -> bool:
    if device not in _KEYS or not isinstance(node.target, OpOverload):
        return False
    name, key = node.target.name(), _KEYS[device]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _dtype_without_autocast(node: fx.Node, value: FakeTensor) -> torch.dtype | None:
    """What the op gives on its own; None where it raises, as a product of two dtypes does."""
    shapes = value.fake_mode.shape_env
    guards = nullcontext() if shapes is None else shapes.suppress_guards()
    off = without_autocast([value.device.type])
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with value.fake_mode, off, torch.no_grad(), guards:
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError:
            return None
    return result.dtype if isinstance(result, torch.Tensor) else None
