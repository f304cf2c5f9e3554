"""Dotted names of the modules that made a graph's nodes, as ``named_modules()`` spells them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import fx

_STACK_PREFIX = re.compile(r"^[LG]\['[^']*'\]")
_REGISTRY = "(?:_modules|_parameters|_buffers)"
_MODULES_ITEM = re.compile(rf"(?:\.__dict__\['{_REGISTRY}'\]|\.{_REGISTRY})\['([^']+)'\]")
# Wrappers that torch itself leaves out of the names of what they wrap.
_WRAPPER = re.compile(
    r"(?:^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?![^.\[])"
)
_GETATTR = re.compile(r"getattr\((.+?), ['\"]([^'\"]+)['\"]\)")
_ITEM = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")


@lru_cache(maxsize=4096)
def clean_module_path(path: str) -> str:
    """``L['self'].model.layers.0.mlp`` and its other spellings -> ``model.layers.0.mlp``."""
    while (found := _GETATTR.search(path)) is not None:
        path = f"{path[: found.start()]}{found[1]}.{found[2]}{path[found.end() :]}"
    path = _STACK_PREFIX.sub("", path)
    path = _WRAPPER.sub("", _MODULES_ITEM.sub(r".\1", path))
    return _ITEM.sub(r".\1", path).strip(".")


def module_path(node: fx.Node) -> str:
    """Dotted name of the innermost module that made the node, "" outside of any."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return clean_module_path(next(reversed(stack.values()))[0]) if stack else ""


def parameter_name(placeholder: fx.Node, prefix: str) -> str:
    """Full name of the parameter or buffer that an input of Dynamo's graph holds."""
    # Unlike the meta of the node this is there under aot_compile, too.
    source = placeholder._dynamo_source.name  # type: ignore[attr-defined]
    name = clean_module_path(source() if callable(source) else source)
    return f"{prefix}.{name}" if prefix else name


def module_paths(gm: fx.GraphModule) -> tuple[str, ...]:
    """:func:`module_path` of every node, in graph order and with subgraphs.

    The order counts: equal graphs may run the same modules in another one.
    """
    return tuple(module_path(node) for graph in subgraphs(gm) for node in graph.nodes)


def qualify_modules(gm: fx.GraphModule, prefix: str) -> None:
    """Say of all nodes, subgraphs included, that their modules are inside of ``prefix``."""
    root = {prefix: (prefix, torch.nn.Module)}
    for graph in subgraphs(gm):
        for node in graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            inner = {
                key: (f"{prefix}.{clean_module_path(path)}".rstrip("."), kind)
                for key, (path, kind) in stack.items()
            }
            node.meta["nn_module_stack"] = {**root, **inner}


def subgraphs(gm: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph of ``gm`` and those of the modules in it, such as checkpointed layers."""
    return (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
