"""Have Dynamo make constants of Python floats that it has turned into graph inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState


def specialize(gm: fx.GraphModule, positions: Sequence[int]) -> None:
    """Have Dynamo start over with these Python floats as constants.

    Args:
        positions: among the graph's inputs.

    Under ``dynamic=True`` Dynamo turns floats into graph inputs, a norm's eps among them. Inductor
    restarts Dynamo in this way for floats that it cannot hold in tensors
    (``torch/fx/passes/_tensorify_python_scalars.py``).
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    symbols = [name for i in positions for name in _float_symbols(placeholders[i])]
    new = [name for name in symbols if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def _float_symbols(placeholder: fx.Node) -> list[str]:
    values = [placeholder.meta.get("example_value")]
    values += [user.meta.get("example_value") for user in placeholder.users]
    return [str(v.node.expr) for v in values if isinstance(v, torch.SymFloat)]
