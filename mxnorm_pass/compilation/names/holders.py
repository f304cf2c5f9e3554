"""Where Python code holds the modules that it runs: variables, attributes, keys and indices.

Objects are read as they are stored. None of their code runs: properties and the items of lazy
mappings may do anything.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import sysconfig
import types
import weakref
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Objects further away than this, or after so many, are not looked at.
_MAX_DEPTH = 12
_MAX_OBJECTS = 20_000
_MAX_FUNCTIONS = 500
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, torch.dtype, torch.device)
_SEQUENCES = (list, tuple, deque, set, frozenset)
# Mappings whose items are in a dict of theirs.
_WRAPPED_DICTS = (UserDict, weakref.WeakValueDictionary)
_SELF = ("self", "cls")
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
# Python calls these without their being mentioned.
_IMPLICIT = frozenset({"__call__", "__getattr__", "__getitem__", "__iter__", "__enter__"})
_GLOBAL_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_ATTRIBUTE_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"})
_MODULE_STATE = frozenset({"_parameters", "_buffers", "_modules"})


def join(*parts: str) -> str:
    """A dotted name of the parts that are not empty."""
    return ".".join(filter(None, parts))


def arguments(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters, defaults included.

    A decorator's ``*args`` get the names of what it decorates, if that says so (functools.wraps).
    """
    for follow_wrapped in (True, False):
        try:
            signature = inspect.signature(function, follow_wrapped=follow_wrapped)
            bound = signature.bind_partial(*args, **kwargs)
        except (TypeError, ValueError):
            continue
        bound.apply_defaults()
        values = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                values.update(values.pop(name, {}))
        return values
    return {"args": tuple(args), **kwargs}


@dataclass(frozen=True)
class _Loads:
    """What a code object, functions defined in it included, reads by name."""

    names: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _loads(code: types.CodeType) -> _Loads:
    names: set[str] = set()
    attributes: set[str] = set()
    imports: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBAL_LOADS:
            names.add(instruction.argval)
        elif instruction.opname in _ATTRIBUTE_LOADS:
            attributes.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imports.add(instruction.argval)
    if "getattr" in names:
        attributes |= set(_strings(code.co_consts))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _loads(constant)
            names |= inner.names
            attributes |= inner.attributes
            imports |= inner.imports
    return _Loads(frozenset(names), frozenset(attributes), frozenset(imports))


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _strings(constant)


@dataclass
class HolderSearch:
    """Follows what code reads, from variables on, until it meets modules.

    The name of a place is dotted: a variable, then attributes, keys and indices. ``self`` has no
    name of its own. What is near comes first, and the search ends at some distance.

    Args:
        every_attribute: look at all attributes of instances, and not at those alone that the code
            mentions; leave out what installed libraries have in variables of their own.

    Attributes:
        found: (place, module), each module once, in the order in which they were met. What is
            inside of a module is not looked at.
    """

    every_attribute: bool = False
    found: list[tuple[str, nn.Module]] = field(default_factory=list)
    _mentioned: set[str] = field(default_factory=set)
    _queue: deque[tuple[str, Any, int]] = field(default_factory=deque)
    _objects: list[tuple[str, Any, int]] = field(default_factory=list)
    # The objects themselves, so that no id is used twice meanwhile.
    _seen: dict[int, Any] = field(default_factory=dict)
    _functions: dict[int, Any] = field(default_factory=dict)

    def call(
        self, function: Callable[..., Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> None:
        """Start from a function and the arguments that it is called with."""
        kwargs = dict(kwargs or {})
        while isinstance(function, functools.partial):
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        for name, value in arguments(function, args, kwargs).items():
            self.variable(name, value)
        if not isinstance(function, types.FunctionType):
            # A bound method, or an object with __call__: what it is bound to is its self.
            self._put("", getattr(function, "__self__", function), 0)
        self._put("", function, 0)

    def variable(self, name: str, value: Any) -> None:
        """Start from the value of a variable of that name."""
        self._put("" if name in _SELF else name, value, 0)

    def inside(self, name: str, module: nn.Module) -> None:
        """Start from what a module of that name holds without having registered it."""
        for attribute, value in list(vars(module).items()):
            if attribute not in _MODULE_STATE and not _is_empty(value):
                self._put(join(name, attribute), value, 1)
        self._class(name, type(module), 1, every=True)

    def run(self) -> None:
        """Follow everything until nothing is new: what is met may mention other attributes."""
        done, mentioned = 0, 0
        while True:
            while self._queue:
                self._follow(*self._queue.popleft())
            if mentioned < len(self._mentioned):
                done, mentioned = 0, len(self._mentioned)
            if done == len(self._objects):
                return
            for place, value, depth in self._objects[done:]:
                done += 1
                self._attributes(place, value, depth)

    def _put(self, place: str, value: Any, depth: int) -> None:
        known = isinstance(value, _PLAIN) or id(value) in self._seen
        if not known and depth <= _MAX_DEPTH and len(self._seen) < _MAX_OBJECTS:
            self._seen[id(value)] = value
            self._queue.append((place, value, depth))

    def _follow(self, place: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            self.found.append((place, value))
        elif isinstance(value, weakref.ref):
            self._put(place, value(), depth + 1)
        elif isinstance(value, functools.partial):
            self._put(place, value.func, depth + 1)
            for name, argument in arguments(value.func, value.args, value.keywords).items():
                self._put(name, argument, depth + 1)
        elif isinstance(value, types.MethodType):
            self._put(place, value.__self__, depth + 1)
            self._put(place, value.__func__, depth + 1)
        elif isinstance(value, types.FunctionType):
            self._function(place, value, depth)
        elif isinstance(value, _WRAPPED_DICTS):
            self._put(place, vars(value).get("data"), depth + 1)
        elif isinstance(value, (dict, types.MappingProxyType, *_SEQUENCES)):
            for key, item in _items(value):
                self._put(join(place, key), item, depth + 1)
        elif not _is_foreign(value):
            # The variables of a Python module have names of their own.
            is_namespace = isinstance(value, types.ModuleType)
            self._objects.append(("" if is_namespace else place, value, depth + 1))

    def _function(self, place: str, function: types.FunctionType, depth: int) -> None:
        if id(function) in self._functions or len(self._functions) >= _MAX_FUNCTIONS:
            return
        self._functions[id(function)] = function
        code = function.__code__
        self._mentioned |= _loads(code).attributes
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._put("" if name in _SELF else name, _contents(cell), depth + 1)
        skipped = self.every_attribute and _is_installed(code.co_filename)
        if not skipped and not _is_torch(function.__globals__.get("__name__")):
            self._globals(code, function.__globals__, depth + 1)
        self._objects.append((place, function, depth + 1))

    def _globals(self, code: types.CodeType, namespace: Mapping[str, Any], depth: int) -> None:
        loads = _loads(code)
        for name in sorted(loads.names & namespace.keys()):
            self._put(name, namespace[name], depth)
        for name in sorted(loads.imports):
            self._put("", sys.modules.get(name), depth)

    def _class(self, place: str, kind: type, depth: int, every: bool = False) -> None:
        """Attributes of the class, and what its methods read."""
        for base in kind.__mro__:
            if _is_torch(base.__module__) or base.__module__ == "builtins":
                continue
            for name, value in list(vars(base).items()):
                if not (every or name in self._mentioned or name in _IMPLICIT):
                    continue
                function = _function_behind(value)
                if function is not None:
                    self._put("", function, depth + 1)
                elif not name.startswith("__"):
                    self._put(join(place, name), value, depth + 1)

    def _attributes(self, place: str, value: Any, depth: int) -> None:
        is_instance = not isinstance(value, (type, types.ModuleType, types.FunctionType))
        every = self.every_attribute and is_instance
        for name, attribute in _stored(value):
            if every or name in self._mentioned:
                self._put(join(place, name), attribute, depth)
        if is_instance or isinstance(value, type):
            self._class(place, value if isinstance(value, type) else type(value), depth)


def _items(value: Any) -> list[tuple[str, Any]]:
    """Keys and values as they are stored: a subclass may make its items when it is asked for."""
    if isinstance(value, types.MappingProxyType):
        value = dict(value)
    if isinstance(value, dict):
        return [(str(getattr(k, "name", k)), item) for k, item in dict.items(value)]
    base = next(kind for kind in _SEQUENCES if isinstance(value, kind))
    items = list(base.__iter__(value))
    fields = getattr(type(value), "_fields", map(str, range(len(items))))
    return list(zip(fields, items, strict=False))


def _stored(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, type):
        return
    try:
        yield from list(object.__getattribute__(value, "__dict__").items())
    except AttributeError:
        pass
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            descriptor = vars(base).get(name)
            if isinstance(descriptor, types.MemberDescriptorType):
                try:
                    yield name, descriptor.__get__(value)
                except AttributeError:
                    continue


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _function_behind(value: Any) -> types.FunctionType | None:
    """The function of a method, property or the like of a class; None of anything else."""
    for name in ("fget", "func", "__func__"):
        value = getattr(value, name, value) if not isinstance(value, types.FunctionType) else value
    return value if isinstance(value, types.FunctionType) else None


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not dict.__len__(value)


def _is_installed(filename: str) -> bool:
    return filename.startswith(_LIBRARIES)


def _is_torch(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] == "torch"


def _is_foreign(value: Any) -> bool:
    """Is it of torch's or Python's own, which hold no module of the user's?"""
    if isinstance(value, types.ModuleType):
        return _is_torch(value.__name__)
    kind = value if isinstance(value, type) else type(value)
    return _is_torch(kind.__module__) or kind.__module__ == "builtins"


def outermost(places: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Those of the modules that are inside of no other."""
    listed = list(places)
    inside = {id(m) for _, outer in listed for m in outer.modules() if m is not outer}
    return [(place, module) for place, module in listed if id(module) not in inside]
