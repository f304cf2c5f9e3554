"""What the backend would do to a model, without running any of its kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
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
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))

    def run(*args: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, args)
            outputs = copied(*fakes)
        return pytree.tree_map_only(Tensor, _zeros_like, outputs)

    return run


def _zeros_like(fake: Tensor) -> Tensor:
    zeros = torch.zeros(tuple(fake.shape), dtype=fake.dtype, device=fake.device)
    return zeros.requires_grad_(fake.requires_grad)
