"""What the backend would do to a model, without running any of its kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from mxnorm_pass.compilation.fake_models import traceable
from mxnorm_pass.compilation.inner import trace_only
from mxnorm_pass.compilation.job import CompileJob
from mxnorm_pass.options.parse import parse
from mxnorm_pass.report.announce import announce_failure
from mxnorm_pass.report.report import Report


def explain(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Trace ``model(*args, **kwargs)`` and report what ``backend="mxnorm"`` would rewrite.

    With grad on, the backward is traced too. No kernel of the model runs, nothing is compiled
    and no cache is read or written; what follows a graph break sees zeros. A model needs no
    weights: one on the meta device, or built under ``FakeTensorMode``, is traced as on a CPU.

    Args:
        model: an ``nn.Module`` or a function; one that is compiled already is explained anew.
        options: as for ``torch.compile``.

    Raises:
        ValueError: an option is unknown or has a wrong value.
    """
    parsed = parse(options)
    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        job = CompileJob.of(gm, example_inputs, parsed)
        job.check_channels()
        stand_in = _without_content(gm)
        try:
            job.prepare()
            trace_only(job)
        except Exception as error:
            announce_failure(error, gm)
            raise
        for result in job.results:
            report.add(result.graph)
        return stand_in

    limits = {"recompile_limit": 2**20, "accumulated_recompile_limit": 2**20}
    function = _uncompiled(model)
    with torch._dynamo.config.patch(limits), traceable(function, (args, kwargs)) as inputs:
        torch.compile(function, backend=backend)(*inputs[0], **inputs[1])  # type: ignore[no-untyped-call]
    return report


def _uncompiled(model: Any) -> Any:
    original = getattr(model, "_orig_mod", model)
    # After ``model.compile()`` a call of the model runs what that compiled.
    in_place = getattr(original, "_compiled_call_impl", None) is not None
    return original._call_impl if in_place else original


def _without_content(gm: fx.GraphModule) -> Callable[..., Any]:
    """Run the graph on shapes alone and return zeros for its outputs."""
    known = _known_outputs(gm.graph)
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))

    def run(*args: Any) -> Any:
        if known is not None:
            return pytree.tree_map_only(Tensor, _zeros_like, known)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, args)
            outputs = copied(*fakes)
        return pytree.tree_map_only(Tensor, _zeros_like, outputs)

    return run


def _known_outputs(graph: fx.Graph) -> Any:
    """What Dynamo found, where it is the same in each call; else None.

    A mode for fake tensors decomposes linears before a weight of a library's class sees them.
    """
    outputs = graph.output_node().args[0]
    nodes = pytree.tree_leaves(outputs)
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in nodes]
    if not all(v is None or (isinstance(v, Tensor) and _is_static(v)) for v in values):
        return None
    if any(v is None and isinstance(n, fx.Node) for n, v in zip(nodes, values, strict=True)):
        return None
    return pytree.tree_unflatten(values, pytree.tree_structure(outputs))


def _is_static(value: Tensor) -> bool:
    return type(value) is FakeTensor and all(isinstance(size, int) for size in value.shape)


def _zeros_like(fake: Tensor) -> Tensor:
    zeros = torch.zeros(tuple(fake.shape), dtype=fake.dtype, device=fake.device)
    # No leaf, into which what comes after a graph break could not write.
    return zeros.requires_grad_().clone() if fake.requires_grad else zeros
