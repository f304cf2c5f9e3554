"""Find derivatives that a graph of Dynamo's takes itself, as ``torch.func.grad`` does.

Autograd then runs while the graph is traced, and its nodes look like any others: nothing tells
what is a forward there. Such a graph stays as it is, and so does one that is batched by ``vmap``
and then differentiated, where ops of this package have no place.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from mxnorm_pass.passes.before_autograd.scopes import Scope, is_higher_order
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason

_AUTOGRAD = frozenset({"torch.autograd", "torch.autograd.forward_ad", "torch.autograd.functional"})
_FUNCTORCH = ("torch._C._functorch", "torch._functorch", "torch.func")
_FUNCTIONS = frozenset({"_make_dual", "_unpack_dual"})
_METHODS = frozenset({"backward"})
_BATCHING = ("vmap", "batch_dim", "lazy_load_decompositions")


def inner_derivative(scopes: Iterable[Scope], differentiated: bool) -> Skip | None:
    """The refusal of a graph that takes derivatives itself, if it does.

    Args:
        differentiated: autograd differentiates the graph, too.
    """
    for node in (node for scope in scopes for node in scope.nodes):
        name = _function_of_autograd(node)
        is_batching = any(word in name for word in _BATCHING)
        if name and (differentiated or not is_batching):
            what = "batched" if is_batching else "differentiated"
            detail = f"the graph is {what} inside of the compiled function ({name})"
            expected = "a forward that is differentiated outside of torch.compile alone"
            return Skip(SkipReason.BACKWARD, detail, expected=expected)
    return None


def _function_of_autograd(node: fx.Node) -> str:
    """Name of the function of autograd's that the node calls, "" if it calls none."""
    if node.op == "call_method":
        return str(node.target) if node.target in _METHODS else ""
    if node.op != "call_function" or is_higher_order(node):
        return ""
    module = getattr(node.target, "__module__", None) or ""
    name = getattr(node.target, "__name__", "")
    of_functorch = any(f"{module}.".startswith(f"{prefix}.") for prefix in _FUNCTORCH)
    is_one = of_functorch or module in _AUTOGRAD or name in _FUNCTIONS
    return f"{module}.{name}" if is_one else ""
