"""Graphs that run as they are, without generated code; ``aot_compile`` can save them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends import debugging
from torch._functorch import config as functorch_config
from torch.fx.graph import _BoxedCodeGen

# Whoever loads a saved graph imports this module, and the graph calls the ops.
from mxnorm_pass import ops as ops
from mxnorm_pass.errors import InvalidOptionsError

Interpreter = Callable[[fx.GraphModule], fx.Interpreter]
_OutputCode: Any = getattr(debugging, "AOTEagerOutputCode", None)


def run_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], interpreter: Interpreter | None = None
) -> Callable[[list[Any]], Any]:
    """A function of a list of inputs, which it clears, that runs the graph.

    Args:
        interpreter: runs it node by node, so that an error names the node; None: as Python code.

    Raises:
        InvalidOptionsError: ``aot_compile`` asks, and this torch cannot save such graphs.
    """
    if functorch_config.bundled_autograd_cache or (
        _OutputCode is not None and functorch_config.force_autograd_cache
    ):
        return _savable(gm, interpreter)
    if interpreter is None:
        run: Callable[[list[Any]], Any] = debugging.boxed_nop(gm, list(inputs))
        return run
    made = interpreter(gm)

    def run_interpreter(args: list[Any]) -> Any:
        return _interpret(made, args)

    run_interpreter._boxed_call = True  # type: ignore[attr-defined]
    return run_interpreter


def _interpret(interpreter: fx.Interpreter, args: list[Any]) -> Any:
    values = list(args)
    args.clear()
    # The graph of a boxed function takes a list, which the interpreter would unpack once more.
    return interpreter.run(*values, enable_io_processing=False)


def _savable(gm: fx.GraphModule, interpreter: Interpreter | None) -> Callable[[list[Any]], Any]:
    if _OutputCode is None:
        raise InvalidOptionsError(
            f"torch {torch.__version__} cannot save what inner='aot_eager' and 'eager' compile; "
            "call aot_compile with inner='inductor', or with a newer torch"
        )
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()
    code = SavableGraph(gm=gm, interpreter=interpreter)
    code._boxed_call = True
    return code


@dataclass
class SavableGraph(_OutputCode or object):  # type: ignore[misc]
    """torch's own form of such graphs; to load it is to import this package's ops."""

    interpreter: Interpreter | None = None

    def __call__(self, inputs: list[Any]) -> Any:
        if self.interpreter is None:
            return super().__call__(inputs)
        return _interpret(self.interpreter(self.gm), inputs)
