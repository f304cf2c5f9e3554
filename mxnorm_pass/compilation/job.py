"""One call of the backend."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mxnorm_pass.compilation.decompositions import trace_decompositions
from mxnorm_pass.compilation.freezing import is_static
from mxnorm_pass.compilation.inductor_passes import LeaveAlone, MXNormPass, PassSequence, pass_uuid
from mxnorm_pass.compilation.names.graph_names import GraphNames
from mxnorm_pass.compilation.specialize import specialize
from mxnorm_pass.graph.modules import module_paths, subgraphs
from mxnorm_pass.graph.weights import Weight
from mxnorm_pass.options.channel_order import check_channels
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.parse import ParsedOptions, inductor_setting
from mxnorm_pass.passes.before_autograd.derivatives import inner_derivative
from mxnorm_pass.passes.before_autograd.linears import (
    SeedInput,
    UnusedSeed,
    mark_linears,
    unused_seed,
)
from mxnorm_pass.passes.before_autograd.plan import find_plan
from mxnorm_pass.passes.before_autograd.plan_json import from_json as plan_from_json
from mxnorm_pass.passes.before_autograd.provenance import copied_with_bodies, mark_ends
from mxnorm_pass.passes.before_autograd.regions import (
    names_in_layers,
    passed,
    renamings,
    site_of_layer,
    split_regions,
)
from mxnorm_pass.passes.before_autograd.scopes import Scope, scopes_of
from mxnorm_pass.passes.before_autograd.substitute import substitute
from mxnorm_pass.passes.before_autograd.substitution import Substitution
from mxnorm_pass.passes.joint import Analysis, GraphFacts
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason
from mxnorm_pass.report.recording import StoredCompile
from mxnorm_pass.report.site import PassResult


def foreign_subclass(values: Iterable[Any]) -> str | None:
    """Name of a tensor subclass among the values, torchao's aside."""
    for value in values:
        if is_traceable_wrapper_subclass(value):
            kind = type(value)
            if kind.__module__.split(".")[0] != "torchao":
                return kind.__name__
    return None


@dataclass
class CompileJob:
    """One call of the backend.

    Attributes:
        module_paths: dotted name of the module of each node; ``modules`` selects by them.
        weights: names of the inputs that are parameters or buffers, by position.
        weight_nodes: the same by the node of Dynamo's graph.
        elsewhere: modules of what is compiled that are not in this graph.
        tensor_subclass: name of a subclass that the inputs have, torchao's aside.
        is_backward: compiled autograd captured the graph. The forward's compile has rewritten
            what is in it, which knows no module names and no forward from backward; it stays.
        scopes: the graph and the bodies in it.
        differentiated: autograd differentiates the graph.
        plan: the estimates that are put into the graphs.
        originals: by scope number, what was found before there were estimates.
        seed: what each call draws: the input of recipes that was added to the graph.
        plan_seconds: what deciding on the estimates has taken.
        by_scope: by scope number, what the pass did; empty after a warm cache.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    options: ParsedOptions
    module_paths: tuple[str, ...]
    tensor_subclass: str | None
    is_backward: bool
    weights: Mapping[Any, Weight] = field(default_factory=dict)
    weight_nodes: Mapping[fx.Node, Weight] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()
    scopes: tuple[Scope, ...] = ()
    differentiated: bool = False
    plan: list[Substitution] = field(default_factory=list)
    originals: dict[int, Analysis] = field(default_factory=dict)
    plan_seconds: float = 0.0
    seed: SeedInput | UnusedSeed | None = None
    by_scope: dict[int, PassResult] = field(default_factory=dict)

    @classmethod
    def of(
        cls, gm: fx.GraphModule, example_inputs: Sequence[Any], options: ParsedOptions
    ) -> CompileJob:
        is_backward, subclass = _is_backward(), foreign_subclass(example_inputs)
        names = GraphNames() if is_backward else GraphNames.current(options.config.prefix)
        names.write(gm)
        options = replace(options, config=names.with_layers(options.config))
        names.guard_rules(options.config)
        weights = names.weights(gm, example_inputs)
        return cls(
            gm,
            example_inputs,
            options,
            module_paths(gm),
            subclass,
            is_backward,
            weights=weights,
            elsewhere=names.elsewhere(gm, weights, options.config),
        )

    @property
    def config(self) -> MXNormConfig:
        return self.options.config

    def prepare(self, stored: StoredCompile | None = None) -> None:
        """Put estimates into the graph, if it is differentiated, and marks that the pass reads.

        Args:
            stored: an earlier compile of this very graph, which saves a trace.
        """
        if self.is_backward:
            return
        if self._is_random:
            # It may get an input, and so may bodies in it, of which Dynamo knows nothing.
            self.gm = copied_with_bodies(self.gm)
        placeholders = _placeholders(self.gm)
        self.weight_nodes = {placeholders[i]: weight for i, weight in self.weights.items()}
        split_regions(self.gm, self.config, self.weight_nodes)
        self.scopes = scopes_of(self.gm)
        self.differentiated = _needs_gradients(self.example_inputs)
        self._mark_linears()
        if stored is not None:
            self.differentiated = stored.differentiated
            self.plan = plan_from_json(stored.plan, self.scopes)
        elif self.differentiated and self.config.estimates and self._obstacle is None:
            self._find_plan()
        for substitution in self.plan:
            substitute(substitution)
        mark_ends(self.scopes)

    def _mark_linears(self) -> None:
        """Let recipes reach the backward, which autograd is about to write."""
        if not self.config.recipes or self._obstacle is not None:
            return
        if not self.differentiated:
            self.seed = unused_seed(self.scopes) if self._may_be_recomputed else None
            return
        self.seed = seed = mark_linears(self.scopes, self._is_random, self.config.prefix)
        if seed is not None:
            self.example_inputs = [*self.example_inputs, seed.example]
        # Their nodes are others now.
        self.scopes = scopes_of(self.gm)

    @property
    def _is_random(self) -> bool:
        return any(recipe.is_random for recipe in self.config.recipes)

    @property
    def _may_be_recomputed(self) -> bool:
        """May a graph that is not differentiated be one of training, in a reentrant checkpoint?"""
        return self._is_random and _require_gradients(self.example_inputs)

    def _find_plan(self) -> None:
        start = time.perf_counter()
        found = find_plan(
            self.scopes,
            self.example_inputs,
            self.config,
            facts=self.facts,
            decompositions=trace_decompositions(self.config),
        )
        self.differentiated = found is not None
        if found is not None:
            self.plan, self.originals = list(found.substitutions), dict(found.originals)
            specialize(self.gm, self.originals[0].float_inputs)
        self.plan_seconds = time.perf_counter() - start

    @cached_property
    def _obstacle(self) -> Skip | None:
        return inner_derivative(self.scopes, self.differentiated)

    def facts(self, scope: Scope) -> GraphFacts:
        """What is known of a scope's graph."""
        obstacle = self._obstacle
        if obstacle is None and self.differentiated and scope.within("branch"):
            obstacle = _IN_A_BRANCH
        return GraphFacts(
            tensor_subclass=self.tensor_subclass,
            parameters=_parameter_positions(self.gm) if scope.kind == "whole" else frozenset(),
            weights=self.weights if scope.kind == "whole" else passed(scope, self.weight_nodes),
            differentiated=self.differentiated,
            obstacle=obstacle,
        )

    def joint_pass(self, decompositions: dict[Any, Any]) -> CustomGraphPass:
        """The user's passes in Inductor's slot, then ours."""
        if self.is_backward:
            return self.with_users_passes("joint_custom_pre_pass", LeaveAlone())
        ours = MXNormPass(
            self.config,
            module_paths=self.module_paths,
            scopes=self.scopes,
            facts=self.facts,
            originals=self.originals,
            on_result=self._accept,
            decompositions=decompositions,
        )
        return self.with_users_passes("joint_custom_pre_pass", ours)

    def check_channels(self) -> bool:
        """Refuse a calibration in another channel order; False where the order cannot be told.

        Not part of the pass, which a warm cache leaves out: caches know no values of weights.
        """
        calibration = self.config.calibration
        if calibration is None or self.is_backward:
            return True
        parameters = {
            name: self.example_inputs[i]
            for i, weight in self.weights.items()
            for name in weight.names
        }
        return check_channels(calibration, parameters)

    def with_users_passes(self, slot: str, ours: CustomGraphPass) -> CustomGraphPass:
        if self.config.inner != "inductor":
            return ours
        return PassSequence.of(inductor_setting(self.options, slot), ours)

    def _accept(self, scope: Scope, result: PassResult) -> None:
        if scope.kind == "whole":
            specialize(self.gm, result.float_inputs)
            result = replace(result, seconds=result.seconds + self.plan_seconds)
        # A branch stands in the graph once more, in its backward.
        layers = renamings(scope, self.weight_nodes)
        sites = tuple(site_of_layer(site, names) for names in layers for site in result.sites)
        result = replace(
            result,
            graph=replace(result.graph, sites=sites),
            matmul_modules=names_in_layers(result.matmul_modules, layers),
        )
        self.by_scope.setdefault(scope.number, result)

    @property
    def results(self) -> list[PassResult]:
        """What the pass did to each graph, the whole first."""
        return [self.by_scope[number] for number in sorted(self.by_scope)]

    def report_key(self) -> str:
        """Hash of all that decides the result of the pass, computed before gm is consumed."""
        parts = (
            self.joint_pass({}).uuid(),
            sorted((k, pass_uuid(v) or repr(v)) for k, v in self.options.inductor.items()),
            self.module_paths,
            self.gm.print_readable(print_output=False),
            # Near misses show the model's lines, of which the readable code has the innermost.
            [node.meta.get("stack_trace") for g in subgraphs(self.gm) for node in g.nodes],
            [_describe(x) for x in self.example_inputs],
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES],
            _torchao_version(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


_DEVICES = ("cpu", "cuda")


def _torchao_version() -> str:
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return ""


def _is_backward() -> bool:
    compile_id = torch._guards.CompileContext.current_compile_id()
    return compile_id is not None and compile_id.compiled_autograd_id is not None


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _parameter_positions(gm: fx.GraphModule) -> frozenset[int]:
    """Which inputs of Dynamo's graph are parameters or buffers of a module."""
    return frozenset(i for i, node in enumerate(_placeholders(gm)) if is_static(node))


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    parts: list[Any] = [type(value).__name__, tuple(value.shape), value.dtype, value.device]
    parts.append(value.requires_grad)
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        parts += [context, *(_describe(getattr(value, name)) for name in names)]
    else:
        parts.append(tuple(value.stride()))
    return repr(parts)


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    """May autograd differentiate the graph?"""
    return torch.is_grad_enabled() and _require_gradients(example_inputs)


def _require_gradients(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


_IN_A_BRANCH = Skip(
    SkipReason.BACKWARD,
    "the norm is in a branch or a loop, whose backward computes the forward anew",
    expected="a norm outside of torch.cond, while_loop and their like",
)
