"""Layers that share one body of Dynamo's graph, as ``nested_compile_region`` makes them.

The body bears the names of the first layer that calls it. What the others are called follows from
where their calls stand, and from the parameters that they pass. Layers that ``modules`` treats
differently get bodies of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from mxnorm_pass.graph.modules import module_path, rename_modules
from mxnorm_pass.graph.weights import Weight
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.before_autograd.provenance import copied_with_bodies
from mxnorm_pass.passes.before_autograd.scopes import Scope, kind_of_call
from mxnorm_pass.report.site import Site

# The inputs of Dynamo's graph that are weights.
Weights = Mapping[fx.Node, Weight]


@dataclass(frozen=True)
class Renaming:
    """What the modules of the layer that a body is named after are called in another layer."""

    first: str
    other: str

    def __call__(self, name: str) -> str:
        if self.first == self.other:
            return name
        if not self.first:
            return f"{self.other}.{name}" if name else self.other
        if name == self.first or name.startswith(f"{self.first}."):
            return f"{self.other}{name[len(self.first) :]}"
        return name


def split_regions(gm: fx.GraphModule, config: MXNormConfig, weights: Weights) -> None:
    """Give callers of one body that ``modules`` treats differently bodies of their own."""
    for body, calls in list(_shared_bodies(gm)):
        by_options: dict[object, list[fx.Node]] = {}
        for call in calls:
            renaming = _renaming(body, calls, call, weights)
            names = [renaming(path) for path in _module_paths(body)]
            names += [n for w in _passed(call, weights).values() for n in (*w.names, *w.linears)]
            by_options.setdefault(config.treatment(names), []).append(call)
        for number, group in enumerate(list(by_options.values())[1:], start=1):
            renaming = _renaming(body, calls, group[0], weights)
            _give_own_body(gm, body, renaming, group, number)
    for child in _bodies(gm):
        split_regions(child, config, weights)


def passed(scope: Scope, weights: Weights) -> dict[int, Weight]:
    """By position, the weights that a region's first caller passes to it."""
    if scope.kind != "region" or scope.parent is None:
        return {}
    outer = dict(weights)
    if scope.parent.kind == "region":
        inputs = scope.parent.gm.graph.find_nodes(op="placeholder")
        outer = {inputs[i]: weight for i, weight in passed(scope.parent, weights).items()}
    return _passed(_caller_named_in(scope.gm, scope.callers), outer)


def _passed(call: fx.Node, weights: Weights) -> dict[int, Weight]:
    operands = enumerate(call.args[2:])
    return {i: weights[n] for i, n in operands if isinstance(n, fx.Node) and n in weights}


def renamings(scope: Scope, weights: Weights) -> list[tuple[Renaming, ...]]:
    """For each layer that runs the scope's graph: how to get its names from the graph's."""
    if scope.parent is None:
        return [()]
    outer = renamings(scope.parent, weights)
    if scope.kind != "region":
        return outer
    own = [_renaming(scope.gm, scope.callers, call, weights) for call in scope.callers]
    return [(renaming, *others) for others in outer for renaming in own]


def site_of_layer(site: Site, names: Sequence[Renaming]) -> Site:
    """The site under the names of one of the layers that share its graph."""
    consumers = tuple(_renamed(name, names) for name in site.consumers)
    return replace(site, norm=_renamed(site.norm, names), consumers=consumers)


def names_in_layers(paths: Sequence[str], layers: Sequence[Sequence[Renaming]]) -> tuple[str, ...]:
    """The names that the modules have in each of the layers."""
    return tuple(dict.fromkeys(_renamed(path, names) for names in layers for path in paths))


def _renamed(name: str, names: Sequence[Renaming]) -> str:
    for renaming in names:
        name = renaming(name)
    return name


def _shared_bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, list[fx.Node]]]:
    calls: dict[fx.GraphModule, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if kind_of_call(node) == "region":
            calls.setdefault(getattr(gm, node.args[0].target), []).append(node)
    return ((body, found) for body, found in calls.items() if len(found) > 1)


def _bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [child for child in gm.children() if isinstance(child, fx.GraphModule)]


def _module_paths(body: fx.GraphModule) -> list[str]:
    graphs = [m.graph for m in body.modules() if isinstance(m, fx.GraphModule)]
    return list(dict.fromkeys(module_path(node) for graph in graphs for node in graph.nodes))


def _renaming(
    body: fx.GraphModule, calls: Sequence[fx.Node], call: fx.Node, weights: Weights
) -> Renaming:
    first = _caller_named_in(body, calls)
    if first is call:
        return Renaming("", "")
    at_first, at_call = module_path(first), module_path(call)
    if at_first != at_call:
        return Renaming(at_first, at_call)
    return _by_weights(first, call, weights)


def _caller_named_in(body: fx.GraphModule, calls: Sequence[fx.Node]) -> fx.Node:
    """The call whose module the body's nodes are in."""
    paths = [path for path in _module_paths(body) if path]
    for call in calls:
        prefix = module_path(call)
        if prefix and any(path == prefix or path.startswith(f"{prefix}.") for path in paths):
            return call
    return calls[0]


def _by_weights(first: fx.Node, call: fx.Node, weights: Weights) -> Renaming:
    """Calls of a function: by the first weight in which they differ."""
    for a, b in zip(first.args[2:], call.args[2:], strict=False):
        left, right = _components(a, weights), _components(b, weights)
        if left and right and left != right:
            while left and right and left[-1] == right[-1]:
                left.pop()
                right.pop()
            return Renaming(".".join(left), ".".join(right))
    return Renaming("", "")


def _components(argument: object, weights: Weights) -> list[str]:
    """The name of the weight that an argument is, in its parts; none for anything else."""
    weight = weights.get(argument) if isinstance(argument, fx.Node) else None
    return weight.names[0].split(".") if weight is not None else []


def _give_own_body(
    gm: fx.GraphModule,
    body: fx.GraphModule,
    renaming: Renaming,
    calls: Sequence[fx.Node],
    number: int,
) -> None:
    attribute = calls[0].args[0]
    assert isinstance(attribute, fx.Node)
    name = f"{attribute.target}_mxnorm_{number}"
    setattr(gm, name, _renamed_copy(body, renaming))
    for call in calls:
        own, identifier, *operands = call.args
        with gm.graph.inserting_before(call):
            copied = gm.graph.get_attr(name)
        copied.meta = dict(own.meta)  # type: ignore[union-attr]
        call.args = (copied, f"{identifier}_mxnorm_{number}", *operands)
    gm.recompile()


def _renamed_copy(body: fx.GraphModule, renaming: Renaming) -> fx.GraphModule:
    copied = copied_with_bodies(body)
    for module in copied.modules():
        if isinstance(module, fx.GraphModule):
            rename_modules(module.graph, renaming)
    return copied
