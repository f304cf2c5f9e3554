"""The one refusal: of a norm, of a cast that it reads, or of all norms of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from mxnorm_pass.graph.source_line import source_line
from mxnorm_pass.report.reason import SkipReason
from mxnorm_pass.report.site import NearMiss


@dataclass(frozen=True)
class Skip:
    """Why a norm is left as it is.

    Attributes:
        reason: the kind.
        detail: what was found, in words.
        node: the first node at which the match failed; None for a whole graph.
        expected: what had to stand there, in words; empty where nothing failed.
    """

    reason: SkipReason
    detail: str = ""
    node: fx.Node | None = None
    expected: str = ""

    def __bool__(self) -> Literal[False]:
        return False

    def near_miss(self, anchor: fx.Node) -> NearMiss | None:
        """Where the match failed; ``anchor`` stands in for a node without a source line."""
        if self.node is None or not self.expected:
            return None
        source = source_line(self.node, anchor)
        return NearMiss(self.node.name, self.expected, self.detail, source)
