"""The pass over one joint (or inference) graph: norms, casts, decisions, rewrite, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mxnorm_pass.errors import InvalidOptionsError
from mxnorm_pass.graph.build import copied_graph, created_nodes
from mxnorm_pass.graph.cleanup import remove_dead
from mxnorm_pass.graph.inputs import mark_parameters, mark_weights
from mxnorm_pass.graph.matmul import is_matmul
from mxnorm_pass.graph.nodes import has_backward, input_position, is_backward
from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.graph.weights import Weight
from mxnorm_pass.options.calibration import Calibration
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.garbage_collection import collector_paused
from mxnorm_pass.passes.insert import insert_casts
from mxnorm_pass.passes.match.decide import decide
from mxnorm_pass.passes.match.fusion import Decision, Fusion, Refusal
from mxnorm_pass.passes.match.linears.plain import PlainLinear, linear_name
from mxnorm_pass.passes.match.linears.weight_casts import weight_casts
from mxnorm_pass.passes.match.norms.find import Norm, find_norms
from mxnorm_pass.passes.match.parts import parts_of, parts_of_created
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.passes.mx_linears import WrittenLinear, write_mx_linears
from mxnorm_pass.passes.recipes import linear_casts, note_unreached, write_recipes
from mxnorm_pass.passes.rewrite.estimate import expand_estimates
from mxnorm_pass.passes.rewrite.fusion import rewrite
from mxnorm_pass.report.linear import LinearCasts
from mxnorm_pass.report.reason import SkipReason
from mxnorm_pass.report.site import Graph, PassResult, count_ops
from mxnorm_pass.report.site_graphs import SiteGraphs
from mxnorm_pass.report.snapshot import Alignment, Snapshot
from mxnorm_pass.report.traffic import TrafficEstimate

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What a graph holds, before anything is rewritten.

    Attributes:
        before: the graph as it came in; casts may have been inserted since.
        decisions: one per norm, in graph order.
        inserted: the linears that were given casts, or recipes.
        linears: what becomes of all linears, where a recipe was asked for.
        graph: a copy of the graph as it came in, if it is to be verified.
    """

    before: Snapshot
    norms: tuple[Norm, ...]
    decisions: tuple[Decision, ...]
    inserted: tuple[PlainLinear, ...]
    linears: tuple[LinearCasts, ...]
    matmul_modules: tuple[str, ...]
    graph: fx.Graph | None = None

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        return tuple(d for d in self.decisions if isinstance(d, Fusion))

    @property
    def float_inputs(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(i for norm in self.norms for i in _float_positions(norm)))


@dataclass(frozen=True)
class GraphFacts:
    """What a graph does not say of itself.

    Attributes:
        tensor_subclass: name of a tensor subclass on whose inner tensors the graph works.
        parameters: positions of the graph inputs that are known to be parameters.
        weights: names of those, by position or by the name of the input.
        differentiated: autograd has differentiated the graph, or does so with the graph around it.
        obstacle: why nothing in it may be rewritten.
    """

    tensor_subclass: str | None = None
    parameters: frozenset[int] = frozenset()
    weights: Mapping[Any, Weight] = field(default_factory=dict)
    differentiated: bool = False
    obstacle: Skip | None = None

    @property
    def is_inference(self) -> bool:
        """May linears run on values and scales?"""
        return not self.differentiated and self.tensor_subclass is None and self.obstacle is None


@collector_paused()
def analyze(
    graph: fx.Graph,
    config: MXNormConfig,
    facts: GraphFacts,
    decompositions: Mapping[Any, Any] | None = None,
) -> Analysis:
    """Insert the casts that ``config`` asks for and decide on every norm."""
    before = Snapshot(graph)
    original = copied_graph(graph) if config.verify else None
    mark_parameters(graph, facts.parameters)
    mark_weights(graph, facts.weights)
    note_unreached(graph)
    norms = find_norms(graph)
    untouched = facts.tensor_subclass is not None or facts.obstacle is not None
    tracer = FunctionTracer(decompositions)
    modules = _matmul_modules(graph)
    inserted = () if untouched else insert_casts(graph, norms, config, tracer)
    linears = linear_casts(graph, inserted, config)
    write_recipes(graph, inserted, config, tracer)
    decisions = decide(
        graph,
        norms,
        config,
        tensor_subclass=facts.tensor_subclass,
        differentiated=facts.differentiated,
        obstacle=facts.obstacle,
    )
    analysis = Analysis(
        before, tuple(norms), tuple(decisions), inserted, linears, modules, original
    )
    _check_calibration(analysis.fusions, config.calibration)
    return analysis


@collector_paused()
def run_pass(
    graph: fx.Graph,
    config: MXNormConfig,
    *,
    facts: GraphFacts | None = None,
    decompositions: dict[Any, Any] | None = None,
    original: Analysis | None = None,
) -> PassResult:
    """Rewrite ``graph`` in place; a graph without anything to rewrite is left untouched.

    Args:
        graph: functional ATen graph with fake tensors in ``meta["val"]``; a joint graph marks
            its backward nodes with ``meta["partitioner_tag"]``.
        decompositions: for traced replacements; those that the graph itself was traced with.
        original: of the graph without estimates, where it was traced anew with them. It decides
            on every norm, and is what is reported.
    """
    start = time.perf_counter()
    facts = facts or GraphFacts()
    analysis = analyze(graph, config, facts, decompositions)
    shown = original or analysis
    drawing = _Drawing(shown)
    if original is not None:
        for fusion, again in _pairs(original, analysis):
            drawing.became(fusion, again, analysis)
    with_casts = copied_graph(graph) if config.verify else None
    tracer = FunctionTracer(decompositions)
    for fusion in analysis.fusions:
        with created_nodes(graph) as created:
            rewrite(graph, fusion, tracer)
        drawing.add(fusion, created)
    expand_estimates(graph, tracer)
    linears = write_mx_linears(graph, config) if facts.is_inference else []
    drawing.add_linears(linears, analysis.fusions)
    changed = bool(analysis.fusions or analysis.inserted or linears)
    if changed:
        remove_dead(graph)
        graph.lint()
    if with_casts is not None:
        _verify(shown, with_casts, graph, config)
    after = Snapshot(graph, analysis.before) if changed else analysis.before
    return PassResult(
        drawing.graph(after, one_graph=original is None),
        shown.matmul_modules,
        time.perf_counter() - start,
        shown.float_inputs,
        weight_casts(graph),
    )


class _Drawing:
    """The report of a graph: follows each decision to what it becomes in the end."""

    def __init__(self, analysis: Analysis) -> None:
        self._before = analysis.before
        self._decisions = list(analysis.decisions)
        self._linears = analysis.linears
        parts = (parts_of(d, analysis.norms, analysis.before) for d in analysis.decisions)
        self._site_graphs = SiteGraphs(parts)

    def became(self, fusion: Fusion, again: Fusion, analysis: Analysis) -> None:
        """Say what a fusion is in the graph that was traced anew with estimates in it."""
        index = self._index(fusion)
        self._decisions[index] = again
        self._site_graphs.became(index, parts_of(again, analysis.norms, analysis.before))

    def add(self, fusion: Fusion, created: Iterable[fx.Node]) -> None:
        """Say which nodes the rewrite of a fusion has put into the graph."""
        self._site_graphs.add(self._index(fusion), parts_of_created(created, fusion))

    def add_linears(self, linears: Iterable[WrittenLinear], fusions: Iterable[Fusion]) -> None:
        """Say which linears of the fusions have become ops."""
        readers = [(fusion, {c.linear.matmul for c in fusion.consumers}) for fusion in fusions]
        for linear in linears:
            for fusion, matmuls in readers:
                if linear.node in matmuls:
                    self.add(fusion, linear.created)

    def _index(self, wanted: Fusion) -> int:
        return next(i for i, decision in enumerate(self._decisions) if decision is wanted)

    def graph(self, after: Snapshot, one_graph: bool) -> Graph:
        """The graph before and after, with its sites."""
        before = self._before
        moved = TrafficEstimate(before)
        moved_after = TrafficEstimate(after, moved) if after is not before else moved
        sites = [decision.site() for decision in self._decisions]
        alignment = Alignment(before, after, one_graph)
        return Graph(
            name="training" if has_backward(after.states) else "inference",
            before=before.code(),
            after=after.code(),
            ops_before=_op_counts(before),
            ops_after=_op_counts(after),
            linears=self._linears,
            sites=self._site_graphs.drawn(sites, moved, moved_after, alignment),
            traffic_before=moved.total,
            traffic_after=moved_after.total,
        )


def _verify(
    analysis: Analysis, with_casts: fx.Graph, graph: fx.Graph, config: MXNormConfig
) -> None:
    from mxnorm_pass.passes.verify.verify import verify_gradients, verify_outputs

    verify_gradients(analysis.graph, graph, config)
    if all(fusion.estimator == "exact" for fusion in analysis.fusions):
        verify_outputs(with_casts, graph)


def _pairs(original: Analysis, analysis: Analysis) -> Iterator[tuple[Fusion, Fusion]]:
    """Each fusion that was found at first, and what it is in the graph that was traced anew."""
    again: dict[str, list[Fusion]] = {}
    for fusion in analysis.fusions:
        again.setdefault(fusion.norm.name, []).append(fusion)
    for fusion in original.fusions:
        same_name = again.get(fusion.norm.name)
        if not same_name:
            raise _lost(fusion, analysis)
        yield fusion, same_name.pop(0)


def _lost(fusion: Fusion, analysis: Analysis) -> RuntimeError:
    name = fusion.norm.name
    refusals = (d for d in analysis.decisions if isinstance(d, Refusal) and d.name == name)
    why = "; ".join(str(refusal.site()) for refusal in refusals)
    return RuntimeError(
        f"mxnorm: the norm {name!r} was given its estimate, but cannot be fused in the graph that "
        f"was traced with it ({why or 'it is not there'}). Please report this; meanwhile turn the "
        f"norm off: options={{'modules': {{{name!r}: False}}}}"
    )


def _check_calibration(fusions: Sequence[Fusion], calibration: Calibration | None) -> None:
    """Refuse a calibration of another model; single norms that it does not know stay exact."""
    if calibration is None:
        return
    for fusion in fusions:
        _check_width(fusion, calibration)
    said = {fusion.calibration for fusion in fusions}
    if said and said <= {"unknown"}:
        known = ", ".join([*calibration.weights, *calibration.exact][:3])
        raise InvalidOptionsError(
            "the calibration knows no norm of this graph, so it belongs to another model, or to "
            f"one under another name: it has {known}; the graph has "
            f"{', '.join(fusion.norm.name for fusion in fusions[:3])}. Calibrate this model, "
            "give names a prefix with calibration.under(...) or options={'prefix': ...}, or set "
            "'estimator' for these norms through `modules`"
        )


def _check_width(fusion: Fusion, calibration: Calibration) -> None:
    if fusion.block_weights is None:
        return
    width = len(fusion.block_weights) * calibration.block_size
    block_sizes = {spec.format.block_size for spec in fusion.specs}
    if width != fusion.norm.width or block_sizes != {calibration.block_size}:
        raise InvalidOptionsError(
            f"the calibration belongs to another model or format: its norm {fusion.norm.name!r} "
            f"has width {width} in blocks of {calibration.block_size}, in this graph it has width "
            f"{fusion.norm.width} in blocks of {', '.join(map(str, sorted(block_sizes)))}. "
            "Calibrate this model, with the options of this compile"
        )


def _float_positions(norm: Norm) -> list[int]:
    """Positions of the graph inputs that alone keep the norm from being rewritten."""
    if norm.problem is None or norm.problem.reason is not SkipReason.EPS_INPUT:
        return []
    return [i for i in map(input_position, norm.float_inputs) if i is not None]


def _op_counts(snapshot: Snapshot) -> dict[str, int]:
    return count_ops([state.op for _, state in snapshot.calls()])


def _matmul_modules(graph: fx.Graph) -> tuple[str, ...]:
    names = (linear_name(n) for n in graph.nodes if is_matmul(n) and not is_backward(n))
    return tuple(dict.fromkeys(filter(None, names)))
