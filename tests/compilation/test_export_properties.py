"""Random small models, exported and rewritten: sites and results, and what ``explain`` says."""

from __future__ import annotations

from dataclasses import replace

import torch
from exporting import apply, export
from hypothesis import given
from matching import BF16, expected_warnings
from random_graphs import RandomModel, Reference, arguments
from random_models import assert_same_results, check_sites, compiled, examples
from random_specs import ModelSpec, ReaderSpec, model_specs

import mxnorm_pass
from mxnorm_pass import Report

pytestmark = expected_warnings


def exportable(reader: ReaderSpec, autocast: bool) -> ReaderSpec:
    """torch.export refuses torchao's training linears; of einsum autocast sees but the product."""
    if reader.cast == "torchao training":
        return replace(reader, cast="plain")
    return replace(reader, kind="inline") if autocast and reader.kind == "einsum" else reader


def for_inference(spec: ModelSpec) -> ModelSpec:
    stages = (
        replace(s, readers=tuple(exportable(r, spec.autocast) for r in s.readers))
        for s in spec.stages
    )
    return replace(spec, train=False, stages=tuple(stages))


def check_export(spec: ModelSpec, estimator: str) -> None:
    spec = replace(spec, options={**spec.options, "estimator": estimator})
    model, args = RandomModel(spec), arguments(spec)
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=spec.autocast):
        program, report = apply(export(model, *args), **spec.options)
        got = program.module()(*args)
        reference = Reference.of(model, spec, report)
    check_sites(spec, model, report)
    with torch.no_grad():
        want = reference.outputs(*args)
    if not spec.autocast:
        assert_same_results(got, want)
        return
    for a, b in zip(got, want, strict=True):
        # A bias is added to a strided operand's product with a rounding of its own.
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=2**-7)


@examples(8)
@given(model_specs())
def test_results_of_exported_programs(spec: ModelSpec) -> None:
    spec = for_inference(spec)
    for estimator in ("mxnorm", "exact"):
        check_export(spec, estimator)


def sites_of(report: Report) -> list[tuple[object, ...]]:
    """All that a site says, but for the names of nodes, which other compiles share."""
    return [
        (s.norm, s.consumers, s.status, s.reason, s.estimator, s.gain, s.format, s.detail)
        for s in report.sites
    ]


@examples(4)
@given(model_specs())
def test_explain_and_record_give_the_same_sites(spec: ModelSpec) -> None:
    model, args = RandomModel(spec), arguments(spec)
    _, recorded = compiled(spec, model, args)
    torch._dynamo.reset()
    options = {**spec.options, "inner": "aot_eager"}
    grad = torch.set_grad_enabled(spec.train)
    with grad, torch.autocast("cpu", BF16, enabled=spec.autocast):
        explained = mxnorm_pass.explain(model, *args, options=options)
    if spec.dynamic:
        return
    assert sites_of(explained) == sites_of(recorded)
    misses = ([s.near_miss for s in r.sites] for r in (explained, recorded))
    assert next(misses) == next(misses)
