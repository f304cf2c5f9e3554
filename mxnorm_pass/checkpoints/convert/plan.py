"""Which linears are converted, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mxnorm_pass.checkpoints.convert.formats import is_converted
from mxnorm_pass.names import HEAD_NAMES, clean_module_path
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.options.config import MXNormConfig

# Without a graph a router of experts is known by its name and its few outputs. Low precision flips
# its choice, so that a compile leaves it in high precision.
_ROUTERS = frozenset({"gate", "wg"})
_MAX_EXPERTS = 1024


@dataclass(frozen=True)
class PlannedLinear:
    """A linear to convert, and the format of its weight. Holds the module, not the weight."""

    module: nn.Linear
    format: BlockFormat


@dataclass(frozen=True)
class Plan:
    """What is to be done to a model's linears, by name.

    Attributes:
        linears: to convert.
        left: why the others stay as they are.
    """

    linears: Mapping[str, PlannedLinear]
    left: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, config: MXNormConfig) -> Plan:
        modules = {clean_module_path(name): module for name, module in model.named_modules()}
        kinds = {name: type(module).__name__ for name, module in modules.items()}
        config = config.with_layers_of(kinds)
        linears: dict[str, PlannedLinear] = {}
        left: dict[str, str] = {}
        holders = _Holders(model)
        adapters = tuple(f"{n}." for n, m in modules.items() if n and "base_layer" in m._modules)
        for name, module in modules.items():
            if not isinstance(module, nn.Linear):
                continue
            reason = (
                _kept_as_converted(module)
                or _kept_by_options(name, module, config)
                or ("it is part of an adapter: merge it first" if name.startswith(adapters) else "")
                or _kept_by_module(module)
                or _kept_by_weight(module, config.resolve(name).config.cast_format)
                or holders.others_of(name, module.weight)
            )
            if reason:
                left[name] = reason
            else:
                linears[name] = PlannedLinear(module, config.resolve(name).config.cast_format)
        return cls(linears, left)


def _kept_as_converted(linear: nn.Linear) -> str:
    weight = linear._parameters.get("weight")
    if weight is None or not is_converted(weight):
        return ""
    return f"its weight is converted already, a {type(weight).__name__}"


def _kept_by_options(name: str, linear: nn.Linear, config: MXNormConfig) -> str:
    if config.turns_off(name):
        return "`modules` turns it off"
    is_router = _is_router(name, linear)
    if not config.resolve(name, opt_in=is_router).enabled:
        kind = "a head" if name.rpartition(".")[2] in HEAD_NAMES else "by its name a router"
        return f"it is {kind}, and `modules` does not name it"
    resolved = config.resolve(name)
    if resolved.kept_by_depth:
        return f"it is {resolved.kept_by_depth}"
    if not resolved.config.casts_forward:
        return "its recipe leaves the forward in high precision"
    recipe = resolved.config.recipe
    if recipe is not None and recipe.forward.right.square_blocks:
        return "its recipe casts weights in square blocks, which torchao's tensors do not have"
    return ""


def _is_router(name: str, linear: nn.Linear) -> bool:
    parts = name.lower().split(".")
    named = parts[-1] in _ROUTERS or any("router" in part for part in parts)
    return named and linear.out_features <= _MAX_EXPERTS


def _kept_by_module(linear: nn.Linear) -> str:
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors: remove the parametrization first"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}: convert the model before that is made"
    if type(linear).forward is not nn.Linear.forward:
        return f"it is a {type(linear).__name__} with a forward of its own"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight"
    return ""


def _kept_by_weight(linear: nn.Linear, fmt: BlockFormat) -> str:
    weight = linear.weight
    if weight.is_meta:
        return "its weight is on the meta device: load it first"
    if linear.training and weight.requires_grad:
        return "it is in training: call model.eval(), or weight.requires_grad_(False)"
    if weight.dtype != torch.bfloat16:
        return f"its weight is in {weight.dtype}, and torchao casts torch.bfloat16 alone"
    whole = weight.ndim == 2 and all(n and n % fmt.block_size == 0 for n in weight.shape)
    if not whole:
        return f"its weight {list(weight.shape)} is not in whole blocks of {fmt.block_size}"
    if not weight.is_contiguous():
        return "its weight is not contiguous, as torchao wants it"
    return ""


class _Holders:
    """Under which names the modules of a model have each tensor."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[tuple[object, ...], list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(_place(parameter), []).append(clean_module_path(name))

    def others_of(self, name: str, weight: Tensor) -> str:
        """Why a weight that others hold, too, stays as it is; "" where it is the linear's own."""
        own = f"{name}.weight" if name else "weight"
        others = [other for other in self._names[_place(weight)] if other != own]
        return f"its weight is {others[0]}, too" if others else ""


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where the values are: tied weights may be two parameters on one memory."""
    if type(tensor) is not nn.Parameter or tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr())
