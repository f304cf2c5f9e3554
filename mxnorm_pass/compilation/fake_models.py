"""Models without weights: under ``FakeTensorMode``, or on the meta device.

On the meta device torch 2.13 traces attention in its parts, and no gradient through ``nll_loss``;
what lives there is traced as fake tensors of the CPU, which give the CPU's graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


@contextmanager
def traceable(model: Any, inputs: Any) -> Iterator[Any]:
    """Yield ``inputs`` such that ``model``, a module or its method, can be traced on them.

    Meta tensors among the inputs, and for the time inside those of the model, become fake ones of
    the CPU. Without fake or meta tensors nothing changes.
    """
    places = _tensor_places(model)
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    tensors += [tensor for names, name, tensor in places]
    mode = detect_fake_mode(tensors)
    with ExitStack() as stack:
        if any(t.is_meta for t in tensors):
            mode = mode or FakeTensorMode()
            to_cpu = _MetaToCpu(mode)
            for names, name, tensor in places:
                stack.callback(names.__setitem__, name, tensor)
                names[name] = to_cpu(tensor)
            inputs = pytree.tree_map_only(Tensor, to_cpu, inputs)
            if torch.get_default_device().type == "meta":
                # Factory calls in the model would follow it.
                stack.enter_context(torch.device("cpu"))
        if mode is not None:
            stack.enter_context(mode)
        yield inputs


def _tensor_places(model: Any) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Where the model's modules hold tensors: the dict, the name in it, and the tensor."""
    owner = getattr(model, "__self__", model)
    modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
    dicts = [d for m in modules for d in (m._parameters, m._buffers, vars(m))]
    return [(d, k, v) for d in dicts for k, v in d.items() if isinstance(v, Tensor)]


class _MetaToCpu:
    """Fake CPU tensors in the place of meta ones; tied tensors stay tied."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in self._made:
            self._made[id(tensor)] = self._fake(tensor)
        return self._made[id(tensor)]

    def _fake(self, tensor: Tensor) -> Tensor:
        with self._mode, torch.no_grad():
            fake = self._mode.from_tensor(tensor).detach().to("cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)
