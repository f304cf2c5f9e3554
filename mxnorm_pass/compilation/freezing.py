"""What ``freezing=True`` needs of Dynamo's graph: weights as attributes, not as inputs.

Inductor folds attributes alone. Dynamo makes weights attributes where
``torch._inductor.config.freezing`` is on while it traces, and the options of a compile come into
force only after that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._functorch import config as functorch_config

from mxnorm_pass.compilation.frozen_weights import FrozenWeights
from mxnorm_pass.errors import InvalidOptionsError


@dataclass(frozen=True)
class FrozenGraph:
    """A graph with its weights as attributes.

    Attributes:
        inputs: positions in the original graph of the inputs that are left.
        without_version: inputs that stayed inputs, as nothing tells that they are written to.
    """

    gm: fx.GraphModule
    inputs: tuple[int, ...]
    without_version: tuple[int, ...] = ()

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> FrozenGraph:
        """Copy ``gm``; from now on Dynamo compiles anew where a weight is another tensor.

        Raises:
            InvalidOptionsError: ``aot_compile`` asks, and Inductor saves no frozen graphs.
        """
        if functorch_config.bundled_autograd_cache:
            raise InvalidOptionsError(
                "freezing=True makes weights part of the code, which aot_compile cannot save: "
                "leave it out, or compile without aot_compile"
            )
        frozen, placeholders = _copy(gm)
        kept, without_version = [], []
        for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
            if not is_static(node):
                kept.append(index)
            elif value.is_inference():
                kept.append(index)
                without_version.append(index)
            else:
                source = node._dynamo_source  # type: ignore[attr-defined]
                install_guard(source.make_guard(GuardBuilder.ID_MATCH))
                name = attribute_of(index)
                _make_attribute(frozen, node, name, value)
                frozen._param_name_to_source[name] = source  # type: ignore[index, operator]
        frozen.recompile()
        return cls(frozen, tuple(kept), tuple(without_version))

    def select(self, values: Sequence[Any]) -> list[Any]:
        """Those of the original graph's inputs that this graph still takes."""
        return [values[i] for i in self.inputs]

    def wrap(self, compiled: Callable[..., Any], weights: FrozenWeights) -> Callable[..., Any]:
        """Give the compiled graph the original graph's signature, and see to its weights first."""
        inputs = self.inputs
        # AOTAutograd's function holds the graph; weights are to live as long as their model.
        self.gm._parameters.clear()
        self.gm._buffers.clear()

        def run(*args: Any) -> Any:
            weights.check()
            return compiled(*[args[i] for i in inputs])

        return run


def attribute_of(position: int) -> str:
    """Where a frozen graph has the weight that was the original graph's input there."""
    return f"_mxnorm_frozen_{position}"


def is_static(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter or buffer of a module."""
    return "_dynamo_static_input_type" in (placeholder.meta.get("tensor_dict") or {})


def _copy(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[fx.Node]]:
    """With what AOTAutograd reads of Dynamo's graph beside its nodes to guard on its inputs."""
    frozen = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    frozen.meta.update(gm.meta)
    frozen._param_name_to_source = dict(gm._param_name_to_source)  # type: ignore[arg-type, assignment]
    placeholders = list(frozen.graph.find_nodes(op="placeholder"))
    for node, original in zip(placeholders, gm.graph.find_nodes(op="placeholder"), strict=True):
        node._dynamo_source = original._dynamo_source
    return frozen, placeholders


def _make_attribute(gm: fx.GraphModule, node: fx.Node, name: str, value: torch.Tensor) -> None:
    if isinstance(value, nn.Parameter):
        gm.register_parameter(name, value)
    else:
        gm.register_buffer(name, value)
    with gm.graph.inserting_before(node):
        attribute = gm.graph.get_attr(name)
    attribute.meta = node.meta
    node.replace_all_uses_with(attribute)
    gm.graph.erase_node(node)
