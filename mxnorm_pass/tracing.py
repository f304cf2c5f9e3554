"""What the backend would do to a model, without running any of its kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass.backend import CompileJob, parse, trace_only
from mxnorm_pass.report import Report


def explain(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Trace ``model(*args, **kwargs)`` and report what ``backend="mxnorm"`` would rewrite.

    With grad on, the backward is traced too. No kernel of the model runs, nothing is compiled
    and no cache is read or written; what follows a graph break sees tensors without content.

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
        outputs = _output_values(gm)
        trace_only(job)
        for result in job.results:
            report.add(result.graph)
        return lambda *_: [_without_content(value) for value in outputs]

    limits = {"recompile_limit": 2**20, "accumulated_recompile_limit": 2**20}
    with torch._dynamo.config.patch(limits):
        torch.compile(_uncompiled(model), backend=backend)(*args, **kwargs)  # type: ignore[no-untyped-call]
    return report


def _uncompiled(model: Any) -> Any:
    original = getattr(model, "_orig_mod", model)
    # After ``model.compile()`` a call of the model runs what that compiled.
    in_place = getattr(original, "_compiled_call_impl", None) is not None
    return original._call_impl if in_place else original


def _output_values(gm: fx.GraphModule) -> list[Any]:
    (outputs,) = gm.graph.output_node().args
    assert isinstance(outputs, (tuple, list))
    return [
        node.meta.get("example_value") if isinstance(node, fx.Node) else node for node in outputs
    ]


def _without_content(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in value.shape]
    empty = torch.empty(sizes, dtype=value.dtype, device=value.device)
    return empty.requires_grad_(value.requires_grad)
