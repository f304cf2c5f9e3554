"""A refusal with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mxnorm_pass.report import SkipReason


@dataclass(frozen=True)
class Skip:
    """Why a norm is left as it is.

    Attributes:
        reason: the kind.
        detail: what was found, in words.
        node: the first node at which the match failed.
    """

    reason: SkipReason
    detail: str = ""
    node: fx.Node | None = None

    def __bool__(self) -> bool:
        return False
