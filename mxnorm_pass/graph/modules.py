"""Dotted names of the modules that made a graph's nodes, as ``named_modules()`` spells them.

:mod:`mxnorm_pass.compilation.names.graph_names` writes them into the graphs of torch.compile; what
is read here is as good as the spelling of who else made the graph, such as torch.export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from mxnorm_pass.names import clean_module_path


def module_path(node: fx.Node) -> str:
    """Dotted name of the innermost module that made the node, "" outside of any."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return clean_module_path(next(reversed(stack.values()))[0]) if stack else ""


def spelling_of(placeholder: fx.Node) -> str:
    """How Dynamo spells where it found an input of its graph; "" where it does not say."""
    # Unlike the meta of the node this is there under aot_compile, too.
    source = getattr(placeholder, "_dynamo_source", None)
    name = source.name if source is not None else ""
    return str(name() if callable(name) else name)


def module_paths(gm: fx.GraphModule) -> tuple[str, ...]:
    """:func:`module_path` of every node, in graph order and with subgraphs.

    The order counts: equal graphs may run the same modules in another one.
    """
    return tuple(module_path(node) for graph in subgraphs(gm) for node in graph.nodes)


def rename_modules(graph: fx.Graph, rename: Callable[[str], str]) -> None:
    """Give the modules of all nodes the names that ``rename`` makes of theirs."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (rename(path), kind) for key, (path, kind) in stack.items()
        }


def subgraphs(gm: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph of ``gm`` and those of the modules in it, such as checkpointed layers."""
    return (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
