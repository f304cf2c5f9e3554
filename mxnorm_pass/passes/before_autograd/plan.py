"""Decide, before autograd differentiates a graph, which of its norms become estimates.

Dynamo's graph is traced once for that alone, as it will be traced again with the estimates in it:
decisions are made where ops are ATen's, and carried back by the marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.before_autograd.provenance import (
    Provenance,
    marked_copy,
    note_backward,
    take_marks,
)
from mxnorm_pass.passes.before_autograd.scopes import Scope
from mxnorm_pass.passes.before_autograd.substitution import Substitution, find_substitution
from mxnorm_pass.passes.joint import Analysis, GraphFacts, analyze
from mxnorm_pass.passes.match.fusion import Decision, Fusion
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.passes.recipes import open_linears


@dataclass(frozen=True)
class Plan:
    """What is to become of the norms of a graph that is differentiated.

    Attributes:
        substitutions: the estimates to put into Dynamo's graphs.
        originals: by scope number, what each graph holds before there are estimates.
    """

    substitutions: tuple[Substitution, ...]
    originals: Mapping[int, Analysis]


def find_plan(
    scopes: Sequence[Scope],
    example_inputs: Sequence[Any],
    config: MXNormConfig,
    *,
    facts: Callable[[Scope], GraphFacts],
    decompositions: Mapping[Any, Any],
) -> Plan | None:
    """The plan for a graph of Dynamo's; None where autograd turns out to differentiate nothing.

    Args:
        facts: of a scope's graph.
        decompositions: that the graph will be traced with.
    """
    substitutions: list[Substitution] = []
    originals: dict[int, Analysis] = {}
    traced = _trace(scopes, example_inputs, config, facts, dict(decompositions))
    for analysis, provenance in traced:
        decided, found = _substitutions(analysis, provenance)
        originals[provenance.scope.number] = decided
        substitutions += found
    return Plan(tuple(substitutions), originals) if traced else None


class _Analyzed(Exception):
    """Ends a trace of which nothing more is wanted."""


def _trace(
    scopes: Sequence[Scope],
    example_inputs: Sequence[Any],
    config: MXNormConfig,
    facts: Callable[[Scope], GraphFacts],
    decompositions: dict[Any, Any],
) -> list[tuple[Analysis, Provenance]]:
    """What each joint graph holds, the whole last; nothing where there is none."""
    found: list[tuple[Analysis, Provenance]] = []

    def joint(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        open_linears(gm.graph, FunctionTracer())
        provenance = take_marks(gm.graph, scopes)
        if provenance is not None:
            scope = provenance.scope
            note_backward(gm.graph, provenance)
            # Not yet: what is found may still become an estimate.
            undifferentiated = replace(facts(scope), differentiated=False)
            found.append((analyze(gm.graph, config, undifferentiated), provenance))
            if scope.kind == "whole":
                raise _Analyzed
        return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def inference(gm: fx.GraphModule, inputs: Any) -> Any:
        found.clear()
        raise _Analyzed

    trace = aot_autograd(
        fw_compiler=_never_compiled,
        bw_compiler=_never_compiled,
        inference_compiler=inference,
        partition_fn=joint,
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )
    try:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            trace(marked_copy(scopes), example_inputs)
    except _Analyzed:
        pass
    return found


def _never_compiled(gm: fx.GraphModule, inputs: Any) -> Any:
    raise AssertionError("the trace ends before anything is compiled")


def _substitutions(
    analysis: Analysis, provenance: Provenance
) -> tuple[Analysis, list[Substitution]]:
    """The estimates to put into Dynamo's graph; where there can be none the norm is refused."""
    decided: list[Decision] = []
    accepted: list[Substitution] = []
    for decision in analysis.decisions:
        if isinstance(decision, Fusion) and decision.estimator == "mxnorm":
            found = find_substitution(decision, provenance)
            if isinstance(found, Skip):
                decision = decision.refused(found)
            else:
                accepted.append(found)
        decided.append(decision)
    return replace(analysis, decisions=tuple(decided)), accepted
