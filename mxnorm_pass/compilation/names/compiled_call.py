"""The call of a compiled object that Dynamo captures a graph of, read off the Python stack.

Dynamo tells a backend nothing of what the user compiled, and after a graph break it starts from
the middle of it. The frames of the call are on the stack all the while. What is private to torch
is used here alone, and each use has a way out: where a frame is not there, nothing is known.
"""

from __future__ import annotations

import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo import convert_frame, eval_frame, external_utils
from torch._dynamo.guards import GuardBuilder, install_guard

log = logging.getLogger("mxnorm_pass")

_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl")


@dataclass(frozen=True)
class CompiledCall:
    """A call of a compiled object.

    Attributes:
        function: what was compiled; of a module a method that is bound to it.
        args, kwargs: of the call.
        running: the innermost module whose call the captured code is part of; None outside of
            all, and where the code of the module itself was captured in whole.
        variables, global_variables: of the frame that is captured.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    running: nn.Module | None
    variables: Mapping[str, Any]
    global_variables: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        running: nn.Module | None = None,
    ) -> CompiledCall:
        function = _without_wrapper(function)
        if args and _is_method(function, args[0]):
            function, args = types.MethodType(function, args[0]), args[1:]
        return cls(function, args, kwargs, running, *_captured_scope())

    @property
    def module(self) -> nn.Module | None:
        """The module that was compiled, or whose method was; None of any other function."""
        owner = getattr(self.function, "__self__", self.function)
        return owner if isinstance(owner, nn.Module) else None

    def value_of(self, source: Any) -> Any:
        """What is in a place of the captured frame that Dynamo knows; None where it is gone."""
        scope = {"L": self.variables, "G": self.global_variables}
        try:
            return source.get_value(scope, {}, {})
        except Exception:  # of a property, say
            log.debug("names: nothing is found at %r", source)
            return None

    @property
    def signature_of(self) -> Callable[..., Any]:
        """What has the parameters: of a module that is called, its ``forward``."""
        name = getattr(self.function, "__name__", "__call__")
        is_called = self.module is not None and name in (*_MODULE_CALLS, "__call__")
        return self.module.forward if is_called else self.function  # type: ignore[union-attr]


def current_call() -> CompiledCall | None:
    """The call under way in this thread, the innermost of several; None where there is none."""
    running: nn.Module | None = None
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == convert_frame.__file__:
            # What was further in belongs to the compiler.
            running = None
        elif code.co_name in _MODULE_CALLS and code.co_filename == nn.modules.module.__file__:
            running = running if running is not None else frame.f_locals.get("self")
        elif (given := _given(frame)) is not None:
            return CompiledCall.of(*given, running)
        frame = frame.f_back
    log.debug("names: no call of a compiled object is on the stack")
    return None


def _given(frame: types.FrameType) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """What was compiled, and the arguments of its call, where the frame is of such a call."""
    code = frame.f_code
    if code.co_filename == eval_frame.__file__ and "fn" in code.co_freevars:
        context, function = frame.f_locals.get("self"), frame.f_locals.get("fn")
        if not isinstance(context, eval_frame._TorchDynamoContext):
            return None
        if isinstance(context, eval_frame.DisableContext):
            return None
    elif code.co_name == "aot_compile_fullgraph":
        function = frame.f_locals.get("model")
    else:
        return None
    args, kwargs = frame.f_locals.get("args"), frame.f_locals.get("kwargs")
    if not (callable(function) and isinstance(args, tuple) and isinstance(kwargs, dict)):
        return None
    return function, args, kwargs


def _without_wrapper(function: Any) -> Any:
    """Dynamo wraps what has no frame of its own to capture: modules of torch, partials, objects."""
    code = getattr(function, "__code__", None)
    is_wrapper = code is not None and code.co_filename == external_utils.__file__
    return function.__wrapped__ if is_wrapper and hasattr(function, "__wrapped__") else function


def _is_method(function: Any, owner: Any) -> bool:
    """Is it a function of the object's class, compiled by a decorator, say?"""
    own = inspect.getattr_static(type(owner), getattr(function, "__name__", ""), None)
    names = ("_torchdynamo_orig_callable", "__wrapped__")
    while isinstance(own, types.FunctionType) and own is not function:
        own = next((vars(own)[name] for name in names if name in vars(own)), None)
    return own is function


def _captured_scope() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        captured: Any = InstructionTranslator.current_tx()
        return captured.f_locals, captured.f_globals
    except AttributeError:
        log.debug("names: the variables of the captured frame are unknown")
        return {}, {}


def held_modules(variables: Mapping[str, Any]) -> Iterator[tuple[Any, nn.Module]]:
    """The modules that a captured frame's variables hold, or objects in them, with Dynamo's places.

    That is where Dynamo looks at them before it uses the graph for another call of the code.
    """
    from torch._dynamo.source import AttrSource, GetItemSource, LocalSource

    for name, value in variables.items():
        place = LocalSource(name)
        if isinstance(value, nn.Module):
            yield place, value
        elif isinstance(value, (tuple, list)):
            items = ((GetItemSource(place, i), item) for i, item in enumerate(value))
            yield from ((p, item) for p, item in items if isinstance(item, nn.Module))
        elif type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
            held = getattr(value, "__dict__", {}).items()
            attributes = ((AttrSource(place, own), item) for own, item in held)
            yield from ((p, item) for p, item in attributes if isinstance(item, nn.Module))


def guard_kind(place: Any, kind_of: Callable[[Any], object], kind: object) -> None:
    """Have Dynamo capture anew where the place holds a module of another kind.

    Dynamo uses a graph for all modules that differ in nothing but their weights.

    Args:
        kind_of: called with what is in the place whenever Dynamo looks for a graph to use.
    """
    install_guard(place.make_guard(partial(_mxnorm_kind_match, kind_of=kind_of, kind=kind)))


def _mxnorm_kind_match(
    builder: Any, guard: Any, kind_of: Callable[[Any], object], kind: object
) -> None:
    def has_kind(value: Any) -> bool:
        return kind_of(value) == kind

    try:
        manager = builder.get_guard_manager(guard)
        manager.add_lambda_guard(
            has_kind, [f"how mxnorm treats {guard.name}"], getattr(guard, "user_stack", None)
        )
    except (AttributeError, TypeError):
        log.debug("names: a guard on how a module is treated is one on the module itself")
        GuardBuilder.ID_MATCH(builder, guard)
