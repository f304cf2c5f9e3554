"""Names of weights, and of the linears that have no module of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mxnorm_pass.names import HEAD_NAMES


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, by its names.

    Attributes:
        names: dotted, one for each module that holds it; the first is that of
            ``named_parameters()``.
        linears: the modules among them that a product with it is the product of.
        opt_in: an embedding or the head holds it: other products with it are changed only where
            ``modules`` names them.
    """

    names: tuple[str, ...]
    linears: frozenset[str]
    opt_in: bool

    def linear_in(self, module: str) -> str:
        """Name of the linear that multiplies by it in the code of the module of that name."""
        if module in self.linears:
            return module
        return next((n for n in self.names if _owner(n) == module), self.names[0])


def weight_held_by(holders: Iterable[tuple[str, nn.Module, str]]) -> Weight:
    """Of a tensor.

    Args:
        holders: each module that holds it: the module's name, itself, the tensor's name in it.
    """
    listed = list(holders)
    return Weight(
        names=tuple(dict.fromkeys(_dotted(name, own) for name, _, own in listed)),
        linears=frozenset(n for n, module, own in listed if _is_linear(module, own) and n),
        opt_in=any(_is_embedding(module) or _is_head(name) for name, module, _ in listed),
    )


def named_weights(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Of tensors whose modules are not at hand, by name.

    Args:
        tensors: by dotted name; where the same tensor has several names, it has all of them.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    matrices = [name for name, tensor in tensors.items() if tensor.ndim > 1]
    return {
        name: Weight(
            tuple(names[id(tensor)]),
            frozenset(_owner(n) for n in names[id(tensor)] if _is_alone(n, matrices)),
            opt_in=any(_is_head(_owner(n)) for n in names[id(tensor)]),
        )
        for name, tensor in tensors.items()
    }


def _is_alone(name: str, matrices: Iterable[str]) -> bool:
    """Is it the one matrix of the module that holds it, as far as names tell?"""
    owner = _owner(name)
    others = (n for n in matrices if n != name and f"{n}.".startswith(f"{owner}."))
    return bool(owner) and (name == f"{owner}.weight" or not any(others))


def _is_linear(module: nn.Module, own: str) -> bool:
    if _is_embedding(module):
        return False
    matrices = [n for n, p in module.named_parameters() if p.ndim > 1]
    return own == "weight" or (matrices == [own] and not module._modules)


def _is_embedding(module: nn.Module) -> bool:
    return "Embedding" in type(module).__name__ or isinstance(module, nn.Embedding)


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in HEAD_NAMES


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _dotted(module: str, own: str) -> str:
    return f"{module}.{own}" if module else own
