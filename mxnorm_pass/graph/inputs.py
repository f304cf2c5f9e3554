"""Notes on the inputs of a graph of what it does not say: which are parameters, and their names.

Matching reads the notes and makes none.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import fx

from mxnorm_pass.graph.nodes import input_position
from mxnorm_pass.graph.weights import Weight

PARAMETER = "mxnorm_pass.parameter"


def mark_parameters(graph: fx.Graph, positions: frozenset[int]) -> None:
    """Note which graph inputs are parameters; a graph itself says it of attributes alone."""
    for node in graph.find_nodes(op="placeholder"):
        if input_position(node) in positions or _was_attribute(node):
            node.meta[PARAMETER] = True


def _was_attribute(placeholder: fx.Node) -> bool:
    """Did AOTAutograd find the input as a parameter or buffer of the graph's module?"""
    desc = placeholder.meta.get("desc")
    return desc is not None and (desc.is_param() or desc.is_buffer())


def mark_inputs(graph: fx.Graph, parameters: Container[str]) -> None:
    """Note of every graph input by its name whether it is a parameter."""
    for node in graph.find_nodes(op="placeholder"):
        node.meta[PARAMETER] = node.name in parameters


WEIGHT = "mxnorm_pass.weight"


def mark_weights(graph: fx.Graph, weights: Mapping[Any, Weight]) -> None:
    """Note the names of weights.

    Args:
        weights: by position among the inputs that AOTAutograd was given (of a body, its own), by
            the attribute that it found them in, or by the name of the graph input.
    """
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        desc = node.meta.get("desc")
        while hasattr(desc, "base"):  # of an inner tensor of a subclass
            desc = desc.base
        index = position if desc is None else getattr(desc, "idx", None)
        keys = (index, getattr(desc, "target", None), node.name)
        weight = next((weights[key] for key in keys if key in weights), None)
        if weight is not None:
            node.meta[WEIGHT] = weight
