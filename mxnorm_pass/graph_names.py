"""Names of the modules and weights in a graph of Dynamo's, found by identity.

They are those of ``named_modules()`` of the module that was compiled. A function has the names of
the one root module that it runs; where it runs several, the place that holds each, a variable,
attribute, key or index, is in front of its names.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from mxnorm_pass.compiled_call import CompiledCall, current_call, guard_modules
from mxnorm_pass.config import MXNormConfig
from mxnorm_pass.holders import HolderSearch, join, outermost
from mxnorm_pass.module_names import clean_module_path, subgraphs
from mxnorm_pass.weight_names import Weight, weight_held_by

log = logging.getLogger("mxnorm_pass")

_Stack = dict[str, tuple[str, Any]]


@dataclass
class GraphNames:
    """What is called how around a compile.

    Args:
        prefix: full name of what is compiled.
        call: None: names are made of Dynamo's spellings alone.

    Attributes:
        modules: (name, module), each module once.
    """

    prefix: str = ""
    call: CompiledCall | None = None
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)
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
        """Name a module and all in it that have no name yet."""
        if isinstance(root, DistributedDataParallel):
            self._names.setdefault(id(root), name)
            root = root.module
        for inner, module in root.named_modules():
            if id(module) not in self._names:
                self._names[id(module)] = path = clean_module_path(join(name, inner))
                self.modules.append((path, module))

    def _name_of(self, module_id: int | None) -> str | None:
        if module_id is not None and module_id not in self._names:
            self._search_unregistered()
        return self._names.get(module_id) if module_id is not None else None

    def _search_unregistered(self) -> None:
        """Name the modules that Python code holds without having registered them, once."""
        if self._searched or self.call is None:
            return
        self._searched = True
        search = HolderSearch(every_attribute=True)
        done = 0
        while done < len(self.modules):
            unseen, done = self.modules[done:], len(self.modules)
            for name, module in unseen:
                search.inside(name, module)
            search.follow_attributes()
            if done == len(unseen):
                search.call(self.call.function, self.call.args, self.call.kwargs)
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
                    known[key] = {**outer, **self._named(gm, stack)}
                if known[key]:
                    node.meta["nn_module_stack"] = dict(known[key])

    def _outer_stack(self) -> _Stack:
        outer: _Stack = {self.prefix: (self.prefix, nn.Module)} if self.prefix else {}
        running = self.call.running if self.call is not None else None
        name = self._name_of(id(running)) if running is not None else None
        if name and name != self.prefix:
            outer[f"running {name}"] = (name, type(running))
        return outer

    def _named(self, gm: fx.GraphModule, stack: _Stack) -> _Stack:
        named: _Stack = {}
        parent = ("", self.prefix)
        for key, (spelling, kind) in stack.items():
            name = self._name_of(_module_id(gm, key))
            if name is None:
                name = _spelled(spelling, parent, self.prefix)
            named[key] = (name, kind)
            parent = (spelling, name)
        return named

    def weights(self, inputs: Iterable[Any]) -> dict[int, Weight]:
        """The parameters and buffers among a graph's inputs, by position."""
        owners = ((i, self._owners.get(id(v))) for i, v in enumerate(inputs))
        return {i: weight_held_by(held) for i, held in owners if held is not None}

    @cached_property
    def _owners(self) -> dict[int, list[tuple[str, nn.Module, str]]]:
        owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for name, module in self.modules:
            for own, tensor in chain(module._parameters.items(), module._buffers.items()):
                if isinstance(tensor, Tensor):
                    owners.setdefault(id(tensor), []).append((name, module, own))
        return owners

    def elsewhere(self, module_paths: Iterable[str]) -> frozenset[str]:
        """Modules without children that made no node of the graph: another graph may have them."""
        leaves = {name for name, module in self.modules if not module._modules}
        return frozenset(leaves.difference(module_paths))

    def guard_rules(self, config: MXNormConfig) -> bool:
        """Have Dynamo reuse the graph only for modules that ``config`` treats in the same way.

        After a graph break Dynamo captures the code of a class once, for all its instances.
        Returns whether some of them are treated in another way.
        """
        if self.call is None or not (config.modules or config.calibration):
            return False
        held = [m for value in self.call.variables.values() for m in _modules_in(value)]
        count = Counter(type(module) for _, module in self.modules)
        kinds = {type(m) for m in held if id(m) in self._names and count[type(m)] > 1}
        treatment: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        for _, module in self.modules:
            if type(module) in kinds:
                treatment[module] = config.treatment(self._names_inside(module))
        told_apart = [m for m in held if m in treatment and _differs(m, treatment)]
        if told_apart:
            guard_modules(
                self.call.variables,
                lambda m: treatment.get(m) if isinstance(m, nn.Module) else None,
                told_apart,
            )
        return bool(told_apart)

    def _names_inside(self, module: nn.Module) -> Iterator[str]:
        for inner in module.modules():
            name = self._names.get(id(inner), "")
            yield name
            yield from (join(name, own) for own in inner._parameters)


def _differs(module: nn.Module, treatment: WeakKeyDictionary[nn.Module, str]) -> bool:
    same_class = (t for m, t in treatment.items() if type(m) is type(module))
    return any(t != treatment[module] for t in same_class)


def _roots(call: CompiledCall) -> list[tuple[str, nn.Module]]:
    """The modules that a compiled object runs, none inside of another, each with its place."""
    if call.module is not None:
        return [("", call.module)]
    search = HolderSearch()
    search.call(call.function, call.args, call.kwargs)
    roots = outermost(search.found)
    # A loss or an activation beside a model is no second one.
    models = [root for _, root in roots if _has_state(root)] or [root for _, root in roots]
    if len(models) == 1 and any(models[0].children()):
        roots = [("" if root is models[0] else place, root) for place, root in roots]
    return _told_apart(roots)


def _has_state(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def _told_apart(roots: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """A number behind a place that several variables of that name hold."""
    count: Counter[str] = Counter()
    named = []
    for place, root in roots:
        count[place] += 1
        named.append((place if count[place] == 1 else f"{place}_{count[place]}", root))
    return named


def _module_id(gm: fx.GraphModule, key: str) -> int | None:
    """The identity behind a key of Dynamo's ``nn_module_stack``; None where it has another kind."""
    own = key.partition("@")[0]
    if own.isdecimal():
        return int(own)
    return id(gm._modules[own]) if own in gm._modules else None


def _spelled(spelling: str, parent: tuple[str, str], prefix: str) -> str:
    """A name by Dynamo's spelling, where the module itself is not at hand.

    Args:
        parent: spelling and name of the module that it was called by.
    """
    log.debug("names: %r is in no module that is known", spelling)
    rest = spelling.removeprefix(parent[0])
    if parent[0] and spelling.startswith(parent[0]) and rest[:1] in ("", ".", "["):
        return clean_module_path(f"{parent[1]}{rest}")
    return clean_module_path(join(prefix, clean_module_path(spelling)))


def _modules_in(value: Any) -> list[nn.Module]:
    """The modules that a variable of a captured frame holds, itself or in a tuple or list."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in items if isinstance(item, nn.Module)]
