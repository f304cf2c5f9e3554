"""Check a rewritten graph against itself: is its backward the derivative of its forward?

The whole joint graph is run node by node on random data, in float64 and with MX casts taken as the
identity, so that nothing rounds. Its forward half is differentiated anew by autograd, with the
functions of ``functional`` in the place of this package's ops, and each gradient that the backward
half has computed must be the one that autograd finds. That needs to know nothing of what surrounds
a norm.

Where a model gives gradients of its own, by a hook, ``detach`` or an ``autograd.Function``, the
two differ before the rewrite, too; those gradients are left out, with a line in the log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from mxnorm_pass import ops
from mxnorm_pass.errors import VerificationError
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import ancestors, is_backward
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.verify.float64 import Float64Interpreter

log = logging.getLogger("mxnorm_pass")

# Sums of some thousand terms of float64 in another order differ by 1e-12.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class JointGraph:
    """The inputs and outputs of a joint graph, by what AOTAutograd says of them.

    Attributes:
        inputs: all placeholders.
        outputs: the forward's outputs that have a tangent, with it.
        gradients: for placeholders that have one, the node that holds their gradient.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    outputs: tuple[tuple[fx.Node, fx.Node], ...]
    gradients: Mapping[fx.Node, fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph) -> JointGraph | None:
        """None for a graph without a backward."""
        inputs = tuple(graph.find_nodes(op="placeholder"))
        end = graph.output_node()
        nodes = pytree.tree_leaves(end.args[0])
        by_description = {str(node.meta.get("desc")): node for node in inputs}
        outputs, gradients = [], {}
        for node, description in zip(nodes, end.meta.get("desc") or [], strict=False):
            if not isinstance(node, fx.Node) or description is None:
                continue
            of_input = getattr(description, "grad_of", None)
            if of_input is not None:
                gradients[by_description[str(of_input)]] = node
                continue
            tangent = by_description.get(f"TangentAOTInput(output={description})")
            if tangent is not None:
                outputs.append((node, tangent))
        if not outputs or not gradients:
            return None
        return cls(graph, inputs, tuple(outputs), gradients)


def verify_gradients(before: fx.Graph | None, after: fx.Graph, config: MXNormConfig) -> None:
    """Raise unless the backward half of ``after`` is the derivative of its forward half.

    Args:
        before: the graph without estimates, which tells the model's own gradients apart.

    Raises:
        VerificationError: a gradient differs; the message names the site.
    """
    joint = JointGraph.of(after)
    if joint is None:
        return
    errors = _gradient_errors(joint, config)
    wrong = {position for position, error in errors.items() if not error <= _TOLERANCE}
    if not wrong:
        return
    original = JointGraph.of(before) if before is not None else None
    own = _gradient_errors(original, config, stop=False) if original is not None else {}
    excused = {position for position in wrong if not own.get(position, 0.0) <= _TOLERANCE}
    if excused:
        log.info(
            "verify: the model gives %d of %d gradients in its own way, which are not checked",
            len(excused),
            len(errors),
        )
    if wrong - excused:
        raise VerificationError(_message(joint, wrong - excused, errors))


def _message(joint: JointGraph, wrong: set[int], errors: Mapping[int, float]) -> str:
    worst = max(wrong, key=lambda position: _order(errors[position]))
    names = [joint.inputs[position].name for position in sorted(wrong)]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"verify: after the rewrite the gradient of {shown} is not the derivative of the forward "
        f"(relative error {errors[worst]:.1e}); the site is {_site(joint, wrong)}. Please report "
        "this; meanwhile turn that norm off in `modules`, or use estimator='exact'"
    )


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _site(joint: JointGraph, wrong: set[int]) -> str:
    """The fused norm whose inputs are the likeliest to have just these wrong gradients."""
    positions = {node: position for position, node in enumerate(joint.inputs)}
    differentiable = {positions[node] for node in joint.gradients}

    def likelihood(node: fx.Node) -> float:
        above = {positions[n] for n in ancestors(node) if n in positions} & differentiable
        return len(above & wrong) / max(len(above | wrong), 1)

    fused = [n for n in joint.graph.nodes if ops.normalizes(n.target) and not is_backward(n)]
    best = max(fused, key=likelihood, default=None)
    return repr(module_path(best) or best.name) if best is not None else "unknown"


def _gradient_errors(
    joint: JointGraph, config: MXNormConfig, *, stop: bool = True
) -> dict[int, float]:
    """By position of the input: how far its gradient is from autograd's, relative to its norm.

    Args:
        stop: for autograd, too, ``detach`` stops the gradient. The rewrite reads x around it.
    """
    with _eagerly():
        return _errors_of_run(joint, Float64Interpreter(joint.graph, config, stop=stop))


def _errors_of_run(joint: JointGraph, run: Float64Interpreter) -> dict[int, float]:
    values = random_inputs(joint.inputs)
    leaves = [
        value.double().requires_grad_(node in joint.gradients)
        if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1
        else value
        for node, value in zip(joint.inputs, values, strict=True)
    ]
    results = run.run([*(n for n, _ in joint.outputs), *joint.gradients.values()], leaves)
    outputs, found = results[: len(joint.outputs)], results[len(joint.outputs) :]
    tangents = [leaves[joint.inputs.index(tangent)] for _, tangent in joint.outputs]
    positions = [joint.inputs.index(node) for node in joint.gradients]
    wanted = _autograd(outputs, tangents, [leaves[i] for i in positions])
    return {i: _error(a, b) for i, a, b in zip(positions, found, wanted, strict=True)}


def _autograd(
    outputs: Sequence[Tensor], tangents: Sequence[Tensor], leaves: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    pairs = [(y, g) for y, g in zip(outputs, tangents, strict=True) if y.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    ys, gs = zip(*pairs, strict=True)
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        ys, leaves, [g.detach().reshape(y.shape) for y, g in pairs], allow_unused=True
    )
    return gradients


def _error(found: Tensor, wanted: Tensor | None) -> float:
    if wanted is None:
        wanted = torch.zeros_like(found)
    scale = max(float(wanted.norm()), float(found.norm()))
    return 0.0 if scale == 0 else float((found - wanted).norm()) / scale


def verify_outputs(before: fx.Graph, after: fx.Graph) -> None:
    """Raise unless both graphs' forwards give the same bits on random data.

    Raises:
        VerificationError: an output differs; the message names it.
    """
    inputs = list(after.find_nodes(op="placeholder"))
    with _eagerly(), torch.no_grad():
        values = random_inputs(inputs)
        wanted, got = (_forward_outputs(graph, values) for graph in (before, after))
        for position in wanted.keys() & got.keys():
            (name, a), (_, b) = wanted[position], got[position]
            differing = int(_differs(a, b).sum())
            if differing:
                raise VerificationError(
                    f"verify: estimator='exact' changes the output {name}: {differing} of "
                    f"{a.numel()} elements differ. Please report this"
                )


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where two results have other values; NaN is NaN."""
    if a.is_floating_point():
        # float8 cannot be compared.
        a, b = a.double(), b.double()
    return (a != b) & ~(a.isnan() & b.isnan())


def _forward_outputs(graph: fx.Graph, values: Sequence[Any]) -> dict[int, tuple[str, Tensor]]:
    """By position: the name and value of each output that reads no backward node."""
    env: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), values, strict=True))
    owner = graph.owning_module
    for node in graph.nodes:
        if node.op == "get_attr":
            env[node] = getattr(owner, node.target)
        elif node.op == "call_function" and not is_backward(node):
            # Not every node of the backward is marked.
            if all(n in env for n in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
    outputs = enumerate(pytree.tree_leaves(graph.output_node().args[0]))
    return {i: (n.name, env[n]) for i, n in outputs if isinstance(env.get(n), Tensor)}


@contextmanager
def _eagerly() -> Iterator[None]:
    """Leave the modes under which graphs are compiled, autocast and anomaly mode included."""
    with (
        _disable_current_modes(),
        unset_fake_temporarily(),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.autograd.set_detect_anomaly(False),
    ):
        yield


def random_inputs(placeholders: Sequence[fx.Node]) -> list[Any]:
    """Values for a graph's inputs, the same in every call; sizes are those it was traced with.

    Matrices get elements of 1 / sqrt(width), so that products keep their scale; integers are 0 or
    1, which every table has.
    """
    generators: dict[torch.device, torch.Generator] = {}
    return [_random(node.meta.get("val"), generators) for node in placeholders]


def _random(like: Any, generators: dict[torch.device, torch.Generator]) -> Any:
    if isinstance(like, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return like.node.hint
    if not isinstance(like, Tensor):
        return like
    generator = generators.setdefault(
        like.device, torch.Generator(device=like.device).manual_seed(0)
    )
    shape = [size if isinstance(size, int) else size.node.hint for size in like.shape]
    options: Any = {"device": like.device, "generator": generator}
    if like.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    if not like.is_floating_point():
        return torch.randint(0, 2, shape, dtype=torch.int64, **options).to(like.dtype)
    if like.itemsize == 1:
        exponents = torch.randint(120, 124, shape, **options).to(torch.uint8)
        return exponents.view(like.dtype)
    if len(shape) < 2:
        return (torch.rand(shape, **options) + 0.5).to(like.dtype)
    scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
    return (torch.randn(shape, **options) * scale).to(like.dtype)
