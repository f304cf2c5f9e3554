"""Where Python code holds the modules that it runs: variables, attributes, keys and indices."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
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
_MAX_OBJECTS = 50_000
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, torch.dtype, torch.device)
_SEQUENCES = (list, tuple, deque, set, frozenset)
_MAPPINGS = (dict, UserDict, weakref.WeakValueDictionary, types.MappingProxyType)
_SELF = ("self", "cls")
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
    name of its own.

    Args:
        every_attribute: look at all attributes of an object, and not at those alone that the code
            mentions.

    Attributes:
        found: (place, module), each module once, in the order in which they were met. What is
            inside of a module is not looked at.
    """

    every_attribute: bool = False
    found: list[tuple[str, nn.Module]] = field(default_factory=list)
    _mentioned: set[str] = field(default_factory=set)
    _objects: list[tuple[str, Any, int]] = field(default_factory=list)
    # The objects themselves, so that no id is used twice meanwhile.
    _seen: dict[int, Any] = field(default_factory=dict)
    _functions: dict[int, Any] = field(default_factory=dict)

    def call(
        self, function: Callable[..., Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> None:
        """Follow a function and the arguments that it is called with."""
        kwargs = dict(kwargs or {})
        while isinstance(function, functools.partial):
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        for name, value in arguments(function, args, kwargs).items():
            self.variable(name, value)
        if isinstance(function, types.FunctionType):
            self._function("", function, 0)
        else:
            # A bound method, or an object with __call__: what it is bound to is its self.
            self._value("", getattr(function, "__self__", function), 0)
            self._value("", function, 0)
        self.follow_attributes()

    def variable(self, name: str, value: Any) -> None:
        """Follow the value of a variable of that name."""
        self._value("" if name in _SELF else name, value, 0)

    def inside(self, name: str, module: nn.Module) -> None:
        """Follow what a module of that name holds without having registered it.

        Ends with :meth:`follow_attributes`, after any number of modules.
        """
        for attribute, value in list(vars(module).items()):
            if attribute not in _MODULE_STATE:
                self._value(join(name, attribute), value, 1)
        self._class(name, type(module), 1)

    def _value(self, place: str, value: Any, depth: int) -> None:
        known = isinstance(value, _PLAIN) or id(value) in self._seen
        if known or depth > _MAX_DEPTH or len(self._seen) >= _MAX_OBJECTS:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self.found.append((place, value))
        elif isinstance(value, weakref.ref):
            self._value(place, value(), depth + 1)
        elif isinstance(value, functools.partial):
            self._function(place, value.func, depth + 1)
            for name, argument in arguments(value.func, value.args, value.keywords).items():
                self._value(name, argument, depth + 1)
        elif isinstance(value, types.MethodType):
            self._value(place, value.__self__, depth + 1)
            self._function(place, value.__func__, depth + 1)
        elif isinstance(value, types.FunctionType):
            self._function(place, value, depth + 1)
        elif isinstance(value, _MAPPINGS):
            for key, item in list(value.items()):
                self._value(join(place, str(getattr(key, "name", key))), item, depth + 1)
        elif isinstance(value, _SEQUENCES):
            fields = getattr(value, "_fields", map(str, range(len(value))))
            for key, item in zip(fields, list(value), strict=True):
                self._value(join(place, key), item, depth + 1)
        elif not _is_foreign(value):
            # The variables of a Python module have names of their own.
            is_namespace = isinstance(value, types.ModuleType)
            self._objects.append(("" if is_namespace else place, value, depth + 1))

    def _function(self, place: str, function: Any, depth: int) -> None:
        if not isinstance(function, types.FunctionType):
            self._value(place, function, depth)
            return
        if depth > _MAX_DEPTH or id(function) in self._functions:
            return
        self._functions[id(function)] = function
        code = function.__code__
        self._mentioned |= _loads(code).attributes
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if (held := _contents(cell)) is not None:
                self._value("" if name in _SELF else name, held, depth + 1)
        if not _is_torch(function.__globals__.get("__name__")):
            self._globals(code, function.__globals__, depth + 1)
        self._objects.append((place, function, depth + 1))

    def _globals(self, code: types.CodeType, namespace: Mapping[str, Any], depth: int) -> None:
        loads = _loads(code)
        for name in sorted(loads.names & namespace.keys()):
            self._value(name, namespace[name], depth)
        for name in sorted(loads.imports):
            self._value("", sys.modules.get(name), depth)

    def _class(self, place: str, kind: type, depth: int) -> None:
        """Attributes of the class, and what its methods read."""
        for base in kind.__mro__:
            if _is_torch(base.__module__) or base.__module__ == "builtins":
                continue
            for name, value in list(vars(base).items()):
                function = _function_behind(value)
                if self.every_attribute or name in self._mentioned or name in _IMPLICIT:
                    if function is not None:
                        self._function("", function, depth + 1)
                    elif not name.startswith("__"):
                        self._value(join(place, name), value, depth + 1)

    def follow_attributes(self) -> None:
        """Until nothing is new: what an attribute holds may mention others."""
        progress = None
        while progress != (progress := (len(self._seen), len(self._mentioned))):
            for place, value, depth in list(self._objects):
                for name, attribute in _attributes(value):
                    if self.every_attribute or name in self._mentioned:
                        self._value(join(place, name), attribute, depth)
                is_object = not isinstance(value, (types.ModuleType, types.FunctionType))
                if is_object:
                    self._class(place, value if isinstance(value, type) else type(value), depth)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
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
