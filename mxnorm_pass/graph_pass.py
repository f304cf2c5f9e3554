"""The pass over one joint (or inference) graph: norms -> casts -> sites -> rewrite -> report."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mxnorm_pass import lowering
from mxnorm_pass.calibration import Calibration
from mxnorm_pass.canonicalize import remove_dead
from mxnorm_pass.collector import collector_paused
from mxnorm_pass.config import MXNormConfig
from mxnorm_pass.errors import InvalidOptionsError
from mxnorm_pass.graph_utils import SubgraphCache, created_nodes, input_position, is_backward
from mxnorm_pass.insert import insert_casts
from mxnorm_pass.match import Fusion, find_sites
from mxnorm_pass.match.linear import mark_parameters
from mxnorm_pass.match.matmul import is_matmul
from mxnorm_pass.match.norm import Norm, find_norms
from mxnorm_pass.module_names import module_path
from mxnorm_pass.report import Graph, Site, SkipReason, count_ops
from mxnorm_pass.rewrite import rewrite
from mxnorm_pass.site_graphs import SiteGraphs
from mxnorm_pass.snapshot import Snapshot
from mxnorm_pass.traffic import TrafficEstimate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassResult:
    """What one run of the pass did.

    Attributes:
        graph: code, op counts and sites, named "inference" or "training".
        matmul_modules: dotted names of the modules that multiply matrices in the forward graph.
        seconds: time the pass took, the report included.
        float_inputs: positions of the graph inputs that a norm's eps or factor depends on.
    """

    graph: Graph
    matmul_modules: tuple[str, ...]
    seconds: float
    float_inputs: tuple[int, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.graph.sites


@collector_paused()
def run_pass(
    graph: fx.Graph,
    config: MXNormConfig,
    *,
    tensor_subclass: str | None = None,
    parameters: frozenset[int] = frozenset(),
    decompositions: dict[Any, Any] | None = None,
) -> PassResult:
    """Rewrite ``graph`` in place; a graph without anything to rewrite is left untouched.

    Args:
        graph: functional ATen graph with fake tensors in ``meta["val"]``; a joint graph marks
            its backward nodes with ``meta["partitioner_tag"]``.
        tensor_subclass: name of a tensor subclass on whose inner tensors the graph works.
        parameters: positions of the graph inputs that are known to be parameters.
        decompositions: for traced replacements; those that the graph itself was traced with.
    """
    start = time.perf_counter()
    before = Snapshot(graph)
    modules = _matmul_modules(graph)
    mark_parameters(graph, parameters)
    norms = find_norms(graph)
    inserted = insert_casts(graph, norms, config) if tensor_subclass is None else 0
    found = find_sites(graph, norms, config, tensor_subclass)
    site_graphs = SiteGraphs(before, found, norms)
    fusions = [site for site in found if isinstance(site, Fusion)]
    _check_calibration(fusions, config.calibration)
    subgraphs = SubgraphCache(decompositions)
    for fusion in fusions:
        with created_nodes(graph) as created:
            rewrite(graph, fusion, subgraphs)
        site_graphs.add(fusion, created)
    changed = bool(fusions) or inserted > 0
    if changed:
        remove_dead(graph)
        graph.lint()
    result = _report(before, Snapshot(graph, before) if changed else before, site_graphs)
    return PassResult(
        result,
        modules,
        time.perf_counter() - start,
        tuple(dict.fromkeys(i for norm in norms for i in _float_positions(norm))),
    )


def _report(before: Snapshot, after: Snapshot, site_graphs: SiteGraphs) -> Graph:
    traffic_before = TrafficEstimate(before)
    traffic_after = (
        TrafficEstimate(after, traffic_before) if after is not before else traffic_before
    )
    return Graph(
        name="training" if any(s.backward for s in after.states.values()) else "inference",
        before=before.code(),
        after=after.code(),
        ops_before=_op_counts(before),
        ops_after=_op_counts(after),
        sites=site_graphs.sites(traffic_before, traffic_after),
        traffic_before=traffic_before.total,
        traffic_after=traffic_after.total,
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
    block_sizes = {cast.format.block_size for cast in fusion.casts}
    if width != fusion.norm.width or block_sizes != {calibration.block_size}:
        raise InvalidOptionsError(
            f"the calibration belongs to another model: its norm {fusion.norm.name!r} has width "
            f"{width} in blocks of {calibration.block_size}, in this graph it has width "
            f"{fusion.norm.width} in blocks of {', '.join(map(str, sorted(block_sizes)))}"
        )


def _float_positions(norm: Norm) -> list[int]:
    """Positions of the graph inputs that alone keep the norm from being rewritten."""
    if norm.problem is None or norm.problem.reason is not SkipReason.EPS_INPUT:
        return []
    return [i for i in map(input_position, norm.float_inputs) if i is not None]


def _op_counts(snapshot: Snapshot) -> dict[str, int]:
    return count_ops([state.op for _, state in snapshot.calls()])


def _matmul_modules(graph: fx.Graph) -> tuple[str, ...]:
    names = (module_path(n) for n in graph.nodes if is_matmul(n) and not is_backward(n))
    return tuple(dict.fromkeys(filter(None, names)))


def foreign_subclass(values: Iterable[Any]) -> str | None:
    """Name of a tensor subclass among the values, torchao's aside."""
    for value in values:
        if is_traceable_wrapper_subclass(value):
            kind = type(value)
            if kind.__module__.split(".")[0] != "torchao":
                return kind.__name__
    return None


class MXNormPass(CustomGraphPass):
    """The pass as Inductor's ``joint_custom_pre_pass``.

    Args:
        config: options of this compile.
        module_paths: module name of each node. ``config.modules`` selects by them, and they
            are no part of Inductor's cache key.
        tensor_subclass, parameters, decompositions: see :func:`run_pass`.
        on_result: called with the result of every run.
    """

    def __init__(
        self,
        config: MXNormConfig,
        *,
        module_paths: tuple[str, ...] = (),
        tensor_subclass: str | None = None,
        parameters: frozenset[int] = frozenset(),
        on_result: Callable[[PassResult], None] | None = None,
        decompositions: dict[Any, Any] | None = None,
    ) -> None:
        self.config = config
        self._module_paths = module_paths
        self._tensor_subclass = tensor_subclass
        self._parameters = parameters
        self._on_result = on_result
        self._decompositions = decompositions

    def __call__(self, graph: fx.Graph) -> None:
        result = run_pass(
            graph,
            self.config,
            tensor_subclass=self._tensor_subclass,
            parameters=self._parameters,
            decompositions=self._decompositions,
        )
        if self._on_result is not None:
            self._on_result(result)

    def uuid(self) -> str:
        parts = (
            source_digest(),
            self.config.fingerprint_for(self._module_paths),
            self._tensor_subclass,
            sorted(self._parameters),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


class LeaveAlone(CustomGraphPass):
    """In the place of :class:`MXNormPass` for a graph that is not to be rewritten."""

    def __call__(self, graph: fx.Graph) -> None:
        return

    def uuid(self) -> str:
        return "mxnorm_pass.LeaveAlone"


class LowerOps(CustomGraphPass):
    """Inductor's ``post_grad_custom_pre_pass`` that puts kernels or ATen ops in our ops' place."""

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor.decomposition import select_decomp_table

        lowering.lower(graph, select_decomp_table())

    def uuid(self) -> str:
        return source_digest()


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Hash of this package's sources and of torch's version, for cache keys."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
