"""TODO"""

from __future__ import annotations

from torch import fx

from mxnorm_pass.graph.nodes import BACKWARD, partition_of
from mxnorm_pass.passes.before_autograd.provenance import Provenance


def note_backward(graph: fx.Graph, provenance: Provenance) -> None:
    """Note the backward nodes of a body that is differentiated by itself.

    AOTAutograd does so in the graph of the whole; in a body only the last mark tells.
    """
    if not any(partition_of(node)[0] for node in graph.nodes):
        for node in provenance.behind:
            node.meta[BACKWARD] = True
