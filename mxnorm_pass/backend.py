"""``torch.compile(model, backend="mxnorm")``: options in, a compiled callable out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from mxnorm_pass.compilation.inner import INNER, CompiledFunction, is_frozen, trace_only
from mxnorm_pass.compilation.job import CompileJob
from mxnorm_pass.options.parse import parse
from mxnorm_pass.passes.before_autograd.plan_json import to_json as plan_to_json
from mxnorm_pass.report import recording
from mxnorm_pass.report.announce import announce, announce_failure
from mxnorm_pass.report.recording import StoredCompile
from mxnorm_pass.report.site import PassResult

log = logging.getLogger("mxnorm_pass")


def mxnorm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledFunction:
    """The backend behind the entry point ``torch_dynamo_backends``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs, as fake tensors.
        mode: Inductor's mode.
        options: fields of :class:`MXNormConfig` and Inductor config keys, in one flat dict.

    Raises:
        ValueError: an option is unknown or has a wrong value; the message names it.
    """
    try:
        return _compile(gm, example_inputs, mode, options)
    except Exception as error:
        announce_failure(error, gm)
        raise


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> CompiledFunction:
    job = CompileJob.of(gm, example_inputs, parse(options, mode))
    order_known = job.check_channels()
    key = job.report_key()
    # Without code generation nothing is cached, and nothing is to be saved.
    stored = recording.load(key) if job.config.inner == "inductor" else None
    job.prepare(stored)
    compiled = INNER[job.config.inner](job)
    if job.seed is not None:
        compiled = job.seed.wrap(compiled)
    if job.is_backward:
        return compiled
    results = stored.results if stored is not None else job.results or _retrace(job)
    if job.config.inner == "inductor" and stored is None and results:
        kept = StoredCompile(results, job.differentiated, plan_to_json(job.plan))
        recording.store(key, kept)
    if results:
        announce(
            results,
            job.config,
            job.module_paths,
            order_known,
            job.elsewhere,
            casts_weights=job.config.inner == "inductor" and not is_frozen(job.options),
        )
    return compiled


def _retrace(job: CompileJob) -> Sequence[PassResult]:
    """Recover the report of a compile that came from a cache that outlived it."""
    log.debug("warm compile cache without a stored report: tracing again")
    trace_only(job)
    return job.results
