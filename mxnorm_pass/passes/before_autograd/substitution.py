"""Find in Dynamo's graph, which autograd has not differentiated yet, what a fusion is there.

In a graph that computes derivatives a norm cannot be exchanged for its estimate: its derivative is
elsewhere, in pieces that nothing marks reliably. So the exchange is made before, in the graph that
autograd differentiates. There the fused readers are given an estimate of their own, and what leads
to them from the norm, such as a cast, a view or a hook, is repeated::

    x -> norm -> y -> hook -> linear (fused)      x -> norm -> y -> hook -> router
                       |                     =>   x -> estimate -> y' -> hook' -> linear
                       +----> router

Whatever surrounds the norm, autograd then finds the gradient of what is computed. What is asked of
Dynamo's graph, else the norm is refused: that the norm is a region of it, computed from one x and
one gain alone by ops whose gradients are autograd's own, and that the fused readers are others of
Dynamo's nodes than those that keep the exact norm.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mxnorm_pass.graph.nodes import ancestors, is_dtype_cast, is_view, makes_tensors, strip
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.passes.before_autograd.provenance import Provenance, example_value
from mxnorm_pass.passes.before_autograd.scopes import Scope, is_higher_order
from mxnorm_pass.passes.match.fusion import Fusion
from mxnorm_pass.passes.match.linears.products import cast_use
from mxnorm_pass.passes.match.linears.readers import is_float8
from mxnorm_pass.passes.match.norms.inverse_rms import is_narrowing
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.report.reason import SkipReason


@dataclass(frozen=True)
class Estimate:
    """What the estimate of one norm computes; see ``functional.mxnorm`` for the options.

    Attributes:
        norm: its dotted name.
    """

    norm: str
    eps: float
    p: float
    block_size: int
    gradient: Gradient
    norm_dtype: torch.dtype | None
    block_weights: tuple[float, ...] | None

    @classmethod
    def of(cls, fusion: Fusion) -> Estimate:
        rounding, weights = fusion.norm.rounding, fusion.block_weights
        return cls(
            norm=fusion.norm.name,
            eps=fusion.norm.eps,
            p=fusion.config.p,
            block_size=fusion.specs[0].format.block_size,
            gradient=fusion.gradient,
            norm_dtype=rounding.norm_dtype if rounding else None,
            block_weights=None if weights is None else tuple(weights.tolist()),
        )


@dataclass(frozen=True)
class Substitution:
    """A norm of Dynamo's graph whose fused readers are to read its estimate.

    Attributes:
        scope: whose graph all the nodes are in.
        x, gain: what the norm is computed from; ``gain`` has D elements.
        x_reader, gain_reader: the node in front of which each is to be read, as the norm does
            there: later on something may have been written to it.
        statistic: the node that computes the mean of squares.
        output: the node whose value the estimate stands for.
        steps: on the way from ``output`` to fused readers, what is to be repeated, in order; and
            what intervenes in the gradient of any of these tensors.
        readers: the fused readers.
    """

    scope: Scope
    x: fx.Node
    x_reader: fx.Node
    gain: fx.Node | None
    gain_reader: fx.Node | None
    statistic: fx.Node
    output: fx.Node
    steps: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    estimate: Estimate


def find_substitution(fusion: Fusion, provenance: Provenance) -> Substitution | Skip:
    """How to make the norm an estimate before it is differentiated, or why it cannot be done.

    Args:
        provenance: of the graph that the fusion was found in.
    """
    try:
        return _Search(fusion, provenance).substitution()
    except _Refused as refused:
        return refused.skip


class _Refused(Exception):
    """Carries the refusal out of the search."""

    def __init__(self, skip: Skip) -> None:
        super().__init__(skip.detail)
        self.skip = skip


class _Search:
    def __init__(self, fusion: Fusion, provenance: Provenance) -> None:
        self._fusion = fusion
        self._norm = fusion.norm
        self._provenance = provenance

    def substitution(self) -> Substitution:
        region = self._region
        x = self._source(self._norm.x, "x")
        gain = self._source(self._norm.gain, "the gain") if self._norm.gain is not None else None
        self._check_sources(x, gain)
        self._check_gradients()
        self._check_casts()
        readers = self._fused_readers()
        steps = self._with_interventions(self._steps(readers))
        self._check_unwritten([self._output, *steps])
        gain_readers = [n for n in region if self._reads(n, gain)]
        return Substitution(
            scope=self._scope,
            x=x,
            x_reader=next(n for n in region if self._reads(n, x)),
            gain=gain,
            gain_reader=gain_readers[-1] if gain_readers else None,
            statistic=self._provenance.origins[self._norm.anchor].node,
            output=self._output,
            steps=steps,
            readers=readers,
            estimate=Estimate.of(self._fusion),
        )

    def _refuse(self, detail: str, expected: str, node: fx.Node | None = None) -> _Refused:
        at = node or self._norm.anchor
        return _Refused(Skip(SkipReason.BACKWARD, detail, at, expected))

    def _value(self, node: fx.Node) -> fx.Node | None:
        return self._provenance.values.get(node)

    # The norm

    @cached_property
    def _held(self) -> frozenset[fx.Node]:
        """The traced forward nodes that hold the norm's output, through views and dtype casts."""
        found = {self._norm.product}
        pending = [self._norm.product]
        while pending:
            for user in self._provenance.readers_of(pending.pop()):
                passes = is_view(user) or (is_dtype_cast(user) and not is_float8(user))
                if passes and user not in found:
                    found.add(user)
                    pending.append(user)
        return frozenset(found)

    @cached_property
    def _scope(self) -> Scope:
        origin = self._provenance.origins.get(self._norm.product)
        if origin is None:
            detail = f"{self._norm.product.name} comes from no node of Dynamo's graph"
            raise self._refuse(detail, "a norm that Dynamo's graph computes")
        return origin.scope

    @cached_property
    def _output(self) -> fx.Node:
        """The first of Dynamo's nodes that holds the norm's output."""
        for node in self._scope.nodes:
            if node.op != "placeholder" and self._value(node) in self._held:
                return node
        detail = "the norm is inside of one op of Dynamo's graph, such as an autograd.Function"
        raise self._refuse(detail, "a norm whose output is a value of Dynamo's graph")

    @cached_property
    def _holders(self) -> frozenset[fx.Node]:
        """Dynamo's nodes in the norm's scope that hold its output."""
        nodes = self._scope.nodes
        return frozenset(n for n in nodes if n.op != "placeholder" and self._value(n) in self._held)

    @cached_property
    def _inner(self) -> frozenset[fx.Node]:
        """The traced nodes between x and the norm's output."""
        return self._norm.nodes - self._held

    @cached_property
    def _region(self) -> tuple[fx.Node, ...]:
        """Dynamo's nodes that compute the norm from x and the gain, in order."""
        inner = self._inner
        found: set[fx.Node] = {self._output}
        for traced in (*inner, self._norm.product):
            origin = self._provenance.origins.get(traced)
            if origin is None or origin.scope is not self._scope:
                detail = f"{traced.name} is computed in another body of Dynamo's graph"
                raise self._refuse(detail, "a norm in one body", traced)
            found.add(origin.node)
        pending = list(found)
        while pending:
            # Those that compute nothing, such as a hook, have no traced node of their own.
            for source in pending.pop().all_input_nodes:
                if source not in found and self._value(source) in inner:
                    found.add(source)
                    pending.append(source)
        return tuple(n for n in self._scope.nodes if n in found)

    def _reads(self, node: fx.Node, source: fx.Node | None) -> bool:
        """Does a node of the region read x, or the gain, from where the region takes it?"""
        if source is None:
            return False
        held = self._value(source)
        return any(
            i not in self._region_set and _same_elements(self._value(i), held)
            for i in node.all_input_nodes
        )

    @cached_property
    def _region_set(self) -> frozenset[fx.Node]:
        return frozenset(self._region)

    def _sources(self) -> dict[fx.Node, None]:
        """The tensors that the region reads from outside, in the order of Dynamo's graph."""
        read = {
            source
            for node in self._region
            for source in node.all_input_nodes
            if source not in self._region_set and example_value(source) is not None
        }
        return dict.fromkeys(n for n in self._scope.nodes if n in read)

    def _source(self, traced: fx.Node, what: str) -> fx.Node:
        """The one node outside of the region from which it reads x, or the gain."""
        holders = [n for n in self._sources() if _same_elements(self._value(n), traced)]
        if not holders:
            written = next((n for n in self._sources() if _is_written(n)), None)
            if written is not None:
                expected = f"{what} as the result of the op that writes it, as in `x = x.mul_(2)`"
                raise self._refuse(f"{written.name} is written to in place", expected, traced)
            expected = f"{what} as a value of Dynamo's graph"
            raise self._refuse(f"{what} is computed inside of the norm", expected, traced)
        holders.sort(key=lambda n: self._value(n) is not traced)
        chains = [self._derivation(n) for n in holders]
        source = next((n for n in chains[0] if all(n in chain for chain in chains)), None)
        if source is None:
            names = " and as ".join(n.name for n in holders)
            detail = f"the norm reads {what} as {names}, with gradients of their own"
            raise self._refuse(detail, f"{what} from one node", self._value(holders[-1]))
        if source not in holders:
            self._check_unwritten([source])
        for node in (n for chain in chains for n in chain[: chain.index(source)]):
            if self._interventions_in(node) and self._value(node) is not self._value(source):
                raise self._changes_gradient(self._interventions_in(node)[0], self._value(node))
        return source

    def _interventions_in(self, node: fx.Node) -> tuple[fx.Node, ...]:
        value = self._value(node)
        return self._provenance.interventions.get(value, ()) if value is not None else ()

    def _derivation(self, node: fx.Node) -> list[fx.Node]:
        """The node and what it is but for views and dtype casts that pass gradients on."""
        found = [node]
        while True:
            node = found[-1]
            inputs = [n for n in node.all_input_nodes if example_value(n) is not None]
            if len(inputs) != 1 or node.op == "placeholder" or not _keeps_gradient(node):
                return found
            if not _same_elements(self._value(inputs[0]), self._value(node)):
                return found
            found += inputs

    def _check_sources(self, x: fx.Node, gain: fx.Node | None) -> None:
        """What else the region reads must be x or the gain once more, or independent of them."""
        held = [self._value(n) for n in (x, gain) if n is not None]
        sources = self._sources()
        known = [n for n in sources if any(_same_elements(self._value(n), v) for v in held)]
        differentiated = set[fx.Node]().union(
            *(_graph_inputs(self._value(n)) for n in (x, gain) if n is not None and _tracked(n))
        )
        for source in sources:
            if any(self._same_computation(source, n) for n in known):
                continue
            # Without gradients of its own it may still take part of theirs away.
            if _tracked(source) or not differentiated.isdisjoint(
                _graph_inputs(self._value(source))
            ):
                detail = f"the norm also reads {source.name}"
                raise self._refuse(detail, "x and the gain alone", self._value(source))

    def _same_computation(self, a: object, b: object) -> bool:
        """Are two nodes one, or one expression that is written twice, with the same gradients?"""
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return type(a) is type(b) and a == b
        if a is b:
            return True
        if a.op == "placeholder" or (a.op, a.target, _tracked(a)) != (b.op, b.target, _tracked(b)):
            return False
        if is_higher_order(a) or any(_is_written(n) or self._interventions_in(n) for n in (a, b)):
            return False
        left, right = (pytree.tree_flatten((n.args, n.kwargs)) for n in (a, b))
        return left[1] == right[1] and all(map(self._same_computation, left[0], right[0]))

    # What autograd makes of it

    def _check_gradients(self) -> None:
        """Is the region's gradient the derivative of what it computes?

        Not if something in it stops or changes gradients. All of it without gradients is fine:
        the estimate has none either there.
        """
        untracked = not any(map(_tracked, self._region))
        for node in self._region:
            if is_higher_order(node) or not (untracked or _keeps_gradient(node)):
                raise self._changes_gradient(node, self._value(node))
        for traced in self._inner & self._provenance.interventions.keys():
            raise self._changes_gradient(self._provenance.interventions[traced][0], traced)

    def _changes_gradient(self, node: fx.Node, traced: fx.Node | None) -> _Refused:
        detail = f"{node.name} inside of the norm changes or stops its gradient"
        return self._refuse(detail, "ops whose gradient is autograd's own", traced)

    def _check_unwritten(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if _is_written(node):
                detail = f"{node.name} is written to in place"
                raise self._refuse(detail, "an output that nothing writes to", self._value(node))

    # Who reads it

    def _check_casts(self) -> None:
        """Does each cast of the norm feed fused linears alone?"""
        fused = {consumer.linear.matmul for consumer in self._fusion.consumers}
        for cast in dict.fromkeys(consumer.cast for consumer in self._fusion.consumers):
            if any(use.matmul not in fused for use in cast_use(cast).matmuls):
                detail = f"{cast.values.name} feeds fused and other linears"
                expected = "a cast that feeds nothing but fused linears"
                raise self._refuse(detail, expected, cast.values)

    def _fused_readers(self) -> tuple[fx.Node, ...]:
        """Dynamo's nodes that read the norm for fused consumers, and for nobody else."""
        consumers = self._nodes_of_consumers()
        found: dict[fx.Node, None] = {}
        for reader, traced in self._readers(consumers).items():
            fused = [n for n in traced if n in consumers]
            others = [n for n in traced if n not in consumers]
            if not fused:
                continue
            if others:
                detail = f"{others[0].name} reads the norm in one op with a fused linear"
                expected = "an op that reads the norm for fused linears alone"
                raise self._refuse(detail, expected, others[0])
            if not any(n in self._holders for n in reader.all_input_nodes):
                detail = f"{fused[0].name} does not read the norm through Dynamo's graph"
                raise self._refuse(detail, "a reader in the body of the norm", fused[0])
            found[reader] = None
        if not found:
            detail = "no op of Dynamo's graph reads the norm for its fused linears"
            raise self._refuse(detail, "fused linears that read the norm", self._norm.product)
        return tuple(found)

    def _readers(self, consumers: Container[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """The traced nodes that read the norm's output, by the node of Dynamo's they belong to."""
        found: dict[fx.Node, list[fx.Node]] = {}
        read = (user for node in sorted(self._held) for user in self._provenance.readers_of(node))
        for traced in dict.fromkeys(read):
            if traced in self._held or not makes_tensors(traced):
                continue
            origin = self._provenance.origins[traced].seen_from(self._scope)
            if origin is None and traced not in consumers:
                # It reads what the norm's body returns, which stays exact.
                continue
            if origin is None:
                detail = f"{traced.name} reads the norm outside of the norm's body"
                raise self._refuse(detail, "a reader in the body of the norm", traced)
            found.setdefault(origin.node, []).append(traced)
        return found

    def _nodes_of_consumers(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for consumer in self._fusion.consumers:
            found |= {*consumer.cast.nodes, consumer.linear.matmul}
        return found

    def _steps(self, readers: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """What leads from the output to the readers: views, dtype casts and hooks."""
        read = (n for reader in readers for n in reader.all_input_nodes if n in self._holders)
        return self._way_to(read)

    def _with_interventions(self, steps: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """The steps and all hooks on the tensors on the way, wherever they were set."""
        on_the_way = (self._output, *steps)
        found = [n for tensor in on_the_way for n in self._interventions_in(tensor)]
        for node in found:
            if node not in self._scope.nodes:
                detail = f"{node.name} in another body changes the gradient of the norm's output"
                raise self._refuse(detail, "hooks in the body of the norm", self._norm.product)
        return self._way_to([*steps, *found])

    def _way_to(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """The nodes and what leads to them from the output, in order."""
        found: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node is self._output or node in found:
                continue
            sources = [n for n in node.all_input_nodes if n in self._holders or self._hands_on(n)]
            if len(sources) != 1 or not self._only_repeats(node):
                detail = f"{node.name} holds the norm's output and computes something else, too"
                raise self._refuse(detail, "a view or a dtype cast", self._value(node))
            found.add(node)
            pending += sources
        return tuple(n for n in self._scope.nodes if n in found)

    def _hands_on(self, node: fx.Node) -> bool:
        """Does a node of several results, such as a Function, have the norm's output in them?"""
        several = node.op == "call_function" and example_value(node) is None
        return several and any(n in self._holders for n in node.all_input_nodes)

    def _only_repeats(self, node: fx.Node) -> bool:
        """Does a node of Dynamo's compute nothing but views and casts of the norm's output?"""
        traced = self._provenance.computed_by(node)
        return all(n in self._held or not makes_tensors(n) for n in traced)


def _graph_inputs(traced: fx.Node | None) -> set[fx.Node]:
    """The graph inputs that a traced node is computed from."""
    if traced is None:
        return set()
    return {n for n in (traced, *ancestors(traced)) if n.op == "placeholder"}


def _is_written(node: fx.Node) -> bool:
    value = example_value(node)
    return value is not None and value._version != 0


def _tracked(node: fx.Node) -> bool:
    """Does autograd follow what the node makes, one tensor or several?"""
    values = pytree.tree_leaves(node.meta.get("example_value"))
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _keeps_gradient(node: fx.Node) -> bool:
    """Does autograd differentiate the node in all that it reads, and in its own way?"""
    if is_higher_order(node):
        return False
    return _tracked(node) == any(map(_tracked, node.all_input_nodes))


def _same_elements(a: fx.Node | None, b: fx.Node | None) -> bool:
    """Are two traced nodes one, but for views and dtype casts that lose nothing?"""
    if a is None or b is None:
        return False
    return strip(a, is_view, _is_upcast) is strip(b, is_view, _is_upcast)


def _is_upcast(node: fx.Node) -> bool:
    return is_dtype_cast(node) and not is_narrowing(node)
