"""What a frozen graph reads of its weights, and whether it is still what they hold.

Inductor folds what is computed from weights into constants, of each compiled graph its own. Before
it does, the casts of weights are replaced by those that all graphs share::

    weight [* gain] -> cast -> values, scales -> mx_linear
    attribute, attribute ----------------------> mx_linear
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.freezing_utils import enter_freezing, maybe_set_is_frozen_param
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import is_fake
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from mxnorm_pass import ops
from mxnorm_pass.compilation.inductor_passes import source_digest
from mxnorm_pass.compilation.optimizer_writes import count_writes
from mxnorm_pass.compilation.shared_casts import (
    SharedCast,
    Stamp,
    WeightExpression,
    shared_cast,
    stamps_of,
    storages_of,
)
from mxnorm_pass.errors import InvalidOptionsError
from mxnorm_pass.graph.build import owner_of
from mxnorm_pass.graph.cleanup import remove_dead
from mxnorm_pass.graph.nodes import aten, is_call

_ATTRIBUTE = "_mxnorm_shared_cast_"
_CASTS = (ops.cast, ops.tensor_scale)
_SAME_MEMORY = frozenset(
    {
        aten.view.default,
        aten.view.dtype,
        aten.permute.default,
        aten.t.default,
        aten.transpose.int,
        aten.alias.default,
        aten.detach.default,
    }
)


class FrozenWeights:
    """The weights of one compiled graph, held weakly, and the shared casts that it reads."""

    def __init__(self) -> None:
        self._casts: list[SharedCast] = []
        self._folded: dict[WeakIdRef, str] = {}
        self._weights: list[WeakIdRef] = []
        self._stamps: list[Stamp] = []
        self._storages: list[StorageWeakRef] = []

    def add(self, casts: Iterable[SharedCast], folded: Mapping[WeakIdRef, str]) -> None:
        """Of one graph: the casts, and by weight the names of those that Inductor has."""
        self._casts += casts
        self._folded |= folded
        cast_weights = (weight for cast in self._casts for weight in cast.weights)
        self._weights = list(dict.fromkeys([*self._folded, *cast_weights]))
        self._stamps, self._storages = stamps_of(self._weights), storages_of(self._weights)
        count_writes(tensor for weight in self._weights if (tensor := weight()) is not None)

    def check(self) -> None:
        """Cast anew what was written to since.

        Raises:
            InvalidOptionsError: it is a weight that Inductor has folded.
        """
        stamps = stamps_of(self._weights)
        if stamps == self._stamps:
            return
        for weight, old, new in zip(self._weights, self._stamps, stamps, strict=True):
            if weight in self._folded and new is not None and new != old:
                raise InvalidOptionsError(
                    f"freezing=True: {self._folded[weight]} was written to after it became part "
                    "of the compiled code. Call torch._dynamo.reset() and compile again, or leave "
                    "freezing out where weights change"
                )
        for cast in self._casts:
            cast.refresh()
        self._stamps, self._storages = stamps, storages_of(self._weights)


class ShareCasts(CustomGraphPass):
    """Inductor's ``joint_custom_post_pass`` for frozen graphs: the last before it folds weights.

    Args:
        gm: Dynamo's graph, with its weights as attributes.
        names: of the weights, by attribute.
        weights: filled with what the compiled graph reads.
    """

    def __init__(
        self, gm: fx.GraphModule, names: Mapping[Any, str], weights: FrozenWeights
    ) -> None:
        self._gm = gm
        self._names = names
        self._weights = weights

    def __call__(self, graph: fx.Graph) -> None:
        inputs = graph.find_nodes(op="placeholder")
        found = {node: tensor for node in inputs if (tensor := self._frozen(node)) is not None}
        shared = list(_share(graph, found))
        remove_dead(graph)
        names = {WeakIdRef(tensor): self._name(node) for node, tensor in found.items()}
        folded = {WeakIdRef(tensor) for node, tensor in found.items() if node.users}
        constants = _constants(graph, found)
        for cast, attributes in shared:
            if any(_is_folded(node, constants) for node in attributes):
                folded |= set(cast.weights)
        casts = (cast for cast, _ in shared)
        self._weights.add(casts, {weight: names[weight] for weight in folded})

    def _frozen(self, node: fx.Node) -> Tensor | None:
        """The weight that an input is and stays, if Inductor makes it a constant."""
        tensor = _attribute(self._gm, node.meta.get("desc"))
        # Of what the graph itself writes to Inductor makes no constant.
        written = any(user.target is aten.copy_.default for user in node.users)
        known = isinstance(tensor, Tensor) and not written and not is_fake(tensor)
        return tensor if known and not tensor.is_inference() else None

    def _name(self, node: fx.Node) -> str:
        desc: Any = node.meta["desc"]
        while hasattr(desc, "base"):
            desc = desc.base
        return self._names.get(desc.target, desc.target)

    def __deepcopy__(self, memo: Any) -> ShareCasts:
        """Itself: who copies Inductor's config is not to copy the user's model."""
        return self

    def uuid(self) -> str:
        return source_digest()


def _attribute(gm: fx.GraphModule, desc: Any) -> Any:
    """What AOTAutograd found there: a tensor, or an inner tensor of a subclass."""
    if hasattr(desc, "base"):
        return getattr(_attribute(gm, desc.base), getattr(desc, "attr", ""), None)
    target = getattr(desc, "target", None)
    if not isinstance(target, str):
        return None
    try:
        return operator.attrgetter(target)(gm)
    except AttributeError:
        return None


def _share(
    graph: fx.Graph, weights: Mapping[fx.Node, Tensor]
) -> Iterable[tuple[SharedCast, list[fx.Node]]]:
    """Let all read the shared casts; yields them, and the attributes that hold their results."""
    names: dict[int, str] = {}
    for target in _CASTS:
        for node in graph.find_nodes(op="call_function", target=target):
            expression = WeightExpression.of(node, weights)
            if expression is None:
                continue
            cast = shared_cast(expression)
            readers = [(node, 0)] if target is ops.tensor_scale else _results(node)
            yield (
                cast,
                [_become_attribute(graph, node, cast.results[i], names) for node, i in readers],
            )


def _results(node: fx.Node) -> list[tuple[fx.Node, int]]:
    return [(getitem, getitem.args[1]) for getitem in list(node.users)]  # type: ignore[misc]


def _become_attribute(
    graph: fx.Graph, node: fx.Node, value: Tensor, names: dict[int, str]
) -> fx.Node:
    owner = owner_of(graph)
    if id(value) not in names:
        names[id(value)] = f"{_ATTRIBUTE}{len(names)}"
        owner.register_buffer(names[id(value)], value)
        with enter_freezing():
            # Inductor's cache then keeps its metadata alone, and asks this graph for it again.
            maybe_set_is_frozen_param(value)
    with graph.inserting_before(node):
        attribute = graph.get_attr(names[id(value)])
    attribute.meta = node.meta
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)
    return attribute


def _constants(graph: fx.Graph, weights: Iterable[fx.Node]) -> set[fx.Node]:
    """What Inductor can compute before any call: weights, attributes, and what is made of them."""
    found = {*weights, *graph.find_nodes(op="get_attr")}
    for node in graph.nodes:
        is_op = node.op == "call_function" and not isinstance(node.target, HigherOrderOperator)
        if is_op and node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _is_folded(attribute: fx.Node, constants: Container[fx.Node]) -> bool:
    """Does Inductor compute anything of it that is not in the attribute's own memory?"""
    pending = [attribute]
    while pending:
        for user in pending.pop().users:
            if user not in constants:
                continue
            if not is_call(user, _SAME_MEMORY):
                return True
            pending.append(user)
    return False
