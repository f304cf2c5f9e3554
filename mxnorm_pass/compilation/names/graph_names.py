"""Names of the modules and weights in a graph of Dynamo's, found by identity.

They are those of ``named_modules()`` of the module that was compiled. A function has the names of
the one root module that it runs; where it runs several, the place that holds each, a variable,
attribute, key or index, is in front of its names.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, count
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from mxnorm_pass.compilation.freezing import is_static
from mxnorm_pass.compilation.names.compiled_call import (
    CompiledCall,
    current_call,
    guard_kind,
    held_modules,
)
from mxnorm_pass.compilation.names.holders import HolderSearch, join, outermost
from mxnorm_pass.graph.modules import module_paths, spelling_of, subgraphs
from mxnorm_pass.graph.weights import Weight, named_weights, weight_held_by
from mxnorm_pass.names import clean_module_path
from mxnorm_pass.options.config import MXNormConfig

log = logging.getLogger("mxnorm_pass")

_Stack = dict[str, tuple[str, Any]]


@dataclass
class GraphNames:
    """What is called how around a compile.

    Args:
        prefix: full name of what is compiled.
        call: None: names are made of Dynamo's spellings alone.
    """

    prefix: str = ""
    call: CompiledCall | None = None
    _named: dict[int, tuple[str, nn.Module]] = field(default_factory=dict)
    _searched: bool = False

    @classmethod
    def current(cls, prefix: str = "") -> GraphNames:
        """Of the compiled object whose call is under way."""
        names = cls(prefix, current_call())
        if names.call is not None:
            for place, root in _roots(names.call):
                names._add(join(prefix, place), root)
        return names

    def _add(self, name: str, root: nn.Module) -> None:
        """Name a module and all in it that have no name yet; by number where the name is taken."""
        if id(root) in self._named:
            return
        taken = {known for known, _ in self.modules}
        names = chain([name], (f"{name}_{i}" for i in count(2)))
        name = next(free for free in names if free not in taken)
        if isinstance(root, DistributedDataParallel):
            self._named.setdefault(id(root), (name, root))
            root = root.module
        for inner, module in root.named_modules():
            self._named.setdefault(id(module), (clean_module_path(join(name, inner)), module))

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """(name, module), each module once."""
        return list(self._named.values())

    def _name_of(self, module_id: int | None, kind: Any) -> str | None:
        """The name of the module of that class; where another has its id now, it is gone."""
        if module_id is None:
            return None
        if module_id not in self._named:
            self._search_unregistered()
        name, module = self._named.get(module_id, ("", None))
        return name if type(module) is kind else None

    def _search_unregistered(self) -> None:
        """Name the modules that Python code holds without having registered them, once."""
        if self._searched or self.call is None:
            return
        self._searched = True
        search = HolderSearch(every_attribute=True)
        done = 0
        # What is inside of the modules comes first: its names are relative to theirs.
        while unseen := self.modules[done:]:
            done += len(unseen)
            for name, module in unseen:
                search.inside(name, module)
            search.run()
            self._add_found(search)
        search.call(self.call.signature_of, self.call.args, self.call.kwargs)
        search.run()
        self._add_found(search)

    def _add_found(self, search: HolderSearch) -> None:
        for place, module in search.found:
            is_full = f"{place}.".startswith(f"{self.prefix}.")
            self._add(place if is_full else join(self.prefix, place), module)

    def write(self, gm: fx.GraphModule) -> None:
        """Put final names into ``nn_module_stack`` of all nodes, subgraphs included.

        Nodes without a stack were made by the module whose code the graph is a part of, if any.
        """
        outer, known = self._outer_stack(), dict[Any, _Stack]()
        for graph in subgraphs(gm):
            for node in graph.nodes:
                stack = node.meta.get("nn_module_stack") or {}
                key = tuple((key, spelling) for key, (spelling, _) in stack.items())
                if key not in known:
                    known[key] = {**outer, **self._final(gm, stack)}
                if known[key]:
                    node.meta["nn_module_stack"] = dict(known[key])

    def _outer_stack(self) -> _Stack:
        outer: _Stack = {self.prefix: (self.prefix, nn.Module)} if self.prefix else {}
        running = self.call.running if self.call is not None else None
        name = self._name_of(id(running), type(running)) if running is not None else None
        if name and name != self.prefix:
            outer[f"running {name}"] = (name, type(running))
        return outer

    def _final(self, gm: fx.GraphModule, stack: _Stack) -> _Stack:
        named: _Stack = {}
        parent = ("", self.prefix)
        for key, (spelling, kind) in stack.items():
            name = self._name_of(_module_id(gm, key), kind)
            if name is None:
                name = self._spelled(spelling, parent)
            named[key] = (name, kind)
            parent = (spelling, name)
        return named

    def _spelled(self, spelling: str, parent: tuple[str, str] = ("", "")) -> str:
        """A name by Dynamo's spelling, where what has it is not at hand.

        Args:
            parent: spelling and name of the module that it was called by.
        """
        log.debug("names: %r is in no module that is known", spelling)
        rest = spelling.removeprefix(parent[0])
        if parent[0] and spelling.startswith(parent[0]) and rest[:1] in ("", ".", "["):
            return clean_module_path(f"{parent[1]}{rest}")
        name = clean_module_path(spelling, keep_variable=self.call is not None)
        return clean_module_path(join(self.prefix, self._in_captured(name)))

    def _in_captured(self, name: str) -> str:
        """The full name where exactly one graph that was captured before has a module so called.

        Nodes of an exported module keep the names that they have in it.
        """
        known = {own for own, _ in self.modules}
        captured = (own for own, m in self.modules if isinstance(m, fx.GraphModule))
        full = {join(own, name) for own in captured} & known
        return full.pop() if len(full) == 1 else name

    def weights(self, gm: fx.GraphModule, inputs: Iterable[Any]) -> dict[int, Weight]:
        """The parameters and buffers among a graph's inputs, by position."""
        found: dict[int, Weight] = {}
        nodes = gm.graph.find_nodes(op="placeholder")
        for i, (node, value) in enumerate(zip(nodes, inputs, strict=True)):
            owners = self._owners.get(id(value)) or self._owners.get(self._id_at(node))
            if owners is not None:
                found[i] = weight_held_by(owners)
            elif is_static(node) and (name := self._spelled(spelling_of(node))):
                found[i] = named_weights({name: value})[name]
        return found

    def _id_at(self, placeholder: fx.Node) -> int | None:
        """The identity of a weight of which the backend was given a copy without values."""
        argument = placeholder.meta.get("grapharg")
        known = self.call is not None and is_static(placeholder) and argument is not None
        return id(self.call.value_of(argument.source)) if known else None  # type: ignore[union-attr]

    @cached_property
    def _owners(self) -> dict[int | None, list[tuple[str, nn.Module, str]]]:
        owners: dict[int | None, list[tuple[str, nn.Module, str]]] = {}
        for name, module in self.modules:
            for own, tensor in chain(module._parameters.items(), module._buffers.items()):
                if isinstance(tensor, Tensor):
                    owners.setdefault(id(tensor), []).append((name, module, own))
        return owners

    def elsewhere(
        self, gm: fx.GraphModule, weights: Mapping[int, Weight], config: MXNormConfig
    ) -> frozenset[str]:
        """Names of what may be norms and linears of another graph than ``gm``.

        Modules that are not registered count where a pattern of ``config`` matches no other.
        """
        here = {*module_paths(gm), *_names_multiplied(gm, weights)}
        if config.patterns_without([*here, *(name for name, _ in self.modules)]):
            self._search_unregistered()
        leaves = {name for name, module in self.modules if not module._modules}
        matrices = {join(n, own) for n, m in self.modules for own in _matrices(m)}
        return frozenset((leaves | matrices).difference(here))

    def with_layers(self, config: MXNormConfig) -> MXNormConfig:
        """The options with the number of layers of the modules that are known."""
        return config.with_layers_of({name: type(module).__name__ for name, module in self.modules})

    def guard_rules(self, config: MXNormConfig) -> bool:
        """Have Dynamo reuse the graph only for modules that ``config`` treats in the same way.

        After a graph break Dynamo captures the code of a class once, for all its instances.
        Returns whether some of them are treated in another way.
        """
        if self.call is None or not (config.modules or config.calibration or config.num_layers):
            return False
        held = [(p, m) for p, m in held_modules(self.call.variables) if self._knows(m)]
        number = Counter(type(module) for _, module in self.modules)
        kinds = {type(m) for _, m in held if number[type(m)] > 1}
        treatment: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        for _, module in self.modules:
            if type(module) in kinds:
                treatment[module] = config.treatment(self._names_inside(module))
        told_apart = [(p, m) for p, m in held if m in treatment and _differs(m, treatment)]
        for place, module in told_apart:
            guard_kind(place, partial(_treatment_of, treatment), treatment[module])
        return bool(told_apart)

    def _knows(self, module: nn.Module) -> bool:
        return self._name_of(id(module), type(module)) is not None

    def _names_inside(self, module: nn.Module) -> Iterator[str]:
        for inner in module.modules():
            name, _ = self._named.get(id(inner), ("", None))
            yield name
            yield from (join(name, own) for own in inner._parameters)


def _names_multiplied(gm: fx.GraphModule, weights: Mapping[int, Weight]) -> Iterator[str]:
    """Names of the weights that the graph does more with than to look rows up."""
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        targets = (getattr(user.target, "__name__", "") for user in node.users)
        if i in weights and any(name != "embedding" for name in targets):
            yield from weights[i].names


def _matrices(module: nn.Module) -> list[str]:
    own = module._parameters.items()
    return [name for name, parameter in own if parameter is not None and parameter.ndim == 2]


def _treatment_of(treatment: WeakKeyDictionary[nn.Module, str], value: Any) -> str | None:
    return treatment.get(value) if isinstance(value, nn.Module) else None


def _differs(module: nn.Module, treatment: WeakKeyDictionary[nn.Module, str]) -> bool:
    same_class = (t for m, t in treatment.items() if type(m) is type(module))
    return any(t != treatment[module] for t in same_class)


def _roots(call: CompiledCall) -> list[tuple[str, nn.Module]]:
    """The modules that a compiled object runs, none inside of another, each with its place."""
    if call.module is not None:
        return [("", call.module)]
    search = HolderSearch()
    search.call(call.signature_of, call.args, call.kwargs)
    search.run()
    roots = outermost(search.found)
    # A loss or an activation beside a model is no second one.
    models = [root for _, root in roots if _has_state(root)] or [root for _, root in roots]
    if len(models) == 1 and any(models[0].children()):
        roots = [("" if root is models[0] else place, root) for place, root in roots]
    return roots


def _has_state(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def _module_id(gm: fx.GraphModule, key: str) -> int | None:
    """The identity behind a key of Dynamo's ``nn_module_stack``; None where it has another kind."""
    own = key.partition("@")[0]
    if own.isdecimal():
        return int(own)
    return id(gm._modules[own]) if own in gm._modules else None
