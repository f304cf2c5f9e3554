"""What there is to know of an op, in one row, and its registration with torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)

NAMESPACE = "mxnorm_pass"
# How the report counts the bytes of a call: "pointwise" may be fused with its neighbours,
# "library" reads and writes memory by itself, "none" moves nothing.
Traffic = Literal["pointwise", "library", "none"]


class KernelCall(Protocol):
    """A call of an op that a kernel may run."""

    def why_no_kernel(self) -> str | None:
        """Why no kernel can run it; None if one can."""

    def run_kernel(self, dequantize: torch.dtype | None = None) -> Tensor | tuple[Tensor, ...]:
        """The op's results, from one kernel; with ``dequantize`` values and scales as one."""

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Op:
    """One op of this package.

    Attributes:
        schema: of torch.library; formats cross it by name.
        reference: what it computes, eager: its decomposition, too. It checks its arguments.
        fake: the same on fake tensors.
        call: of its arguments; what a kernel would run. None: no kernel runs it.
        traffic: how the report counts its bytes.
        part: what the report calls it in a site's part of the graph; "": as its neighbours.
        differentiable: it has a derivative, registered apart.
        stays_whole: of its arguments; does a compiled graph call it, rather than what it consists
            of?
        is_called: of its arguments; does a compiled graph call it, as Inductor cannot launch its
            kernel?
        add_first: of an op of rows, the one that adds a residual first.
        along_rows_only: of an op that casts along D and T, the one that casts along D alone.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    call: Callable[[Any, Sequence[Any]], KernelCall] | None = None
    traffic: Traffic = "pointwise"
    part: str = ""
    differentiable: bool = False
    stays_whole: Callable[[Sequence[Any]], bool] | None = None
    is_called: Callable[[Sequence[Any]], bool] | None = None
    add_first: Any = None
    along_rows_only: Any = None


OPS: dict[Any, Op] = {}
_library = torch.library.Library(NAMESPACE, "DEF")


def define(op: Op) -> Any:
    """Register an op with torch; returns its overload, the key of its row in :data:`OPS`."""
    name = op.schema.split("(")[0]
    _library.define(op.schema)
    _library.impl(name, op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", op.fake, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if not op.differentiable:
        _library.impl(name, _without_derivative(overload), "Autograd")
    if op.call is not None:
        _library.impl(name, _kernel_or_reference(overload, op), "CUDA")
    OPS[overload] = op
    return overload


def register_derivative(overload: Any, backward: Any, setup_context: Any) -> None:
    """The derivative of a differentiable op."""
    name = overload._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)


def _kernel_or_reference(overload: Any, op: Op) -> Callable[..., Any]:
    """Where a kernel can run the op it does; where none can, its decomposition."""
    assert op.call is not None
    make_call = op.call

    def run(*args: Any) -> Any:
        call = make_call(overload, args)
        reason = call.why_no_kernel()
        if reason is not None:
            log.debug("%s is decomposed: %s", overload, reason)
            return op.reference(*args)
        with torch.cuda.device(call.device):
            return call.run_kernel()

    return run


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _without_derivative(overload: Any) -> Callable[..., Any]:
    """Refuse to be differentiated: the graphs that call the ops have their backward already."""

    def forward(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(map(_requires_grad, pytree.tree_leaves(args))):
            raise RuntimeError(
                f"{overload} has no derivative: what mxnorm_pass.apply rewrote is for inference. "
                "Run it under torch.no_grad(), or train with torch.compile(model, backend='mxnorm')"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return forward
