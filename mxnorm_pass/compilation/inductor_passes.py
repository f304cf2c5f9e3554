"""The pass and the lower as passes of Inductor, which caches by their uuid."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from mxnorm_pass.graph.trace import FunctionTracer
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes import lower
from mxnorm_pass.passes.before_autograd.provenance import note_backward, take_marks
from mxnorm_pass.passes.before_autograd.scopes import Scope
from mxnorm_pass.passes.joint import Analysis, GraphFacts, run_pass
from mxnorm_pass.passes.recipes import open_linears
from mxnorm_pass.report.site import PassResult


class MXNormPass(CustomGraphPass):
    """The pass as Inductor's ``joint_custom_pre_pass``.

    Graphs without a mark are those that it has seen before, or parts of them; they are left alone.

    Args:
        config: options of this compile.
        module_paths: module name of each node. ``config.modules`` selects by them, and they
            are no part of Inductor's cache key.
        scopes: what Dynamo captured, whose marks the graphs bear.
        facts: of a scope's graph.
        originals: by scope number, what :func:`analyze` found before there were estimates.
        on_result: called with the scope and the result of every run.
        decompositions: see :func:`run_pass`.
    """

    def __init__(
        self,
        config: MXNormConfig,
        *,
        module_paths: tuple[str, ...] = (),
        scopes: Sequence[Scope] = (),
        facts: Callable[[Scope], GraphFacts] | None = None,
        originals: Mapping[int, Analysis] | None = None,
        on_result: Callable[[Scope, PassResult], None] | None = None,
        decompositions: dict[Any, Any] | None = None,
    ) -> None:
        self.config = config
        self._module_paths = module_paths
        self._scopes = scopes
        self._facts = facts or (lambda scope: GraphFacts())
        self._originals = originals or {}
        self._on_result = on_result
        self._decompositions = decompositions

    def __call__(self, graph: fx.Graph) -> None:
        open_linears(graph, FunctionTracer(self._decompositions))
        provenance = take_marks(graph, self._scopes)
        if provenance is None:
            return
        scope, facts = provenance.scope, self._facts(provenance.scope)
        if facts.differentiated:
            note_backward(graph, provenance)
        result = run_pass(
            graph,
            self.config,
            facts=facts,
            decompositions=self._decompositions,
            original=self._originals.get(scope.number),
        )
        if self._on_result is not None:
            self._on_result(scope, result)

    def __deepcopy__(self, memo: Any) -> MXNormPass:
        """Itself: who copies Inductor's config is not to copy the user's model."""
        return self

    def uuid(self) -> str:
        parts = (
            source_digest(),
            self.config.fingerprint_for(self._module_paths),
            *(self._facts_key(scope) for scope in self._scopes),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _facts_key(self, scope: Scope) -> tuple[object, ...]:
        """The same in every process for equal facts; of names it has what ``modules`` makes."""
        facts = self._facts(scope)
        names = (n for w in facts.weights.values() for n in (*w.names, *sorted(w.linears)))
        return (
            facts.tensor_subclass,
            sorted(facts.parameters),
            self.config.fingerprint_for(names),
            [(i, len(w.names), w.opt_in) for i, w in facts.weights.items()],
            facts.differentiated,
            facts.obstacle,
        )


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

        lower.lower(graph, select_decomp_table())

    def uuid(self) -> str:
        return source_digest()


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Hash of this package's sources and of torch's version, for cache keys."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in source_files():
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def source_files() -> list[Path]:
    """All that decides what a compile gives: the modules of the whole package, wherever this is."""
    return sorted(Path(str(files("mxnorm_pass"))).rglob("*.py"))


class PassSequence(CustomGraphPass):
    """A user's passes in an Inductor slot, then ours."""

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self._passes = tuple(passes)

    @classmethod
    def of(cls, users: Any, ours: CustomGraphPass) -> CustomGraphPass:
        if users is None:
            return ours
        passes = users if isinstance(users, (list, tuple)) else (users,)
        return cls([*passes, ours])

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self._passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        """None, which turns Inductor's cache off, if a user's pass cannot name itself."""
        uuids = tuple(map(pass_uuid, self._passes))
        return None if None in uuids else uuids


def pass_uuid(graph_pass: Any) -> Any:
    return graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None
