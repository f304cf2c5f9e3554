"""Casts of weights that all compiled graphs share: one pair of values and scales per cast.

A frozen graph's cast of a weight, times a folded gain if there is one, is computed when the graph
is compiled, once for all graphs of the weight. It is kept as long as the weight lives. Where the
weight or the gain was written to since, it is computed anew into the same memory, which compiled
graphs and CUDA graphs read.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from mxnorm_pass.errors import InvalidOptionsError
from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import ancestors, tensor_of

# From a weight to its cast there are a conversion, the product with a converted gain and a scale.
_MAX_NODES = 32
# What tells whether a tensor was written to: the count of writes, where it lies, in what storage.
Stamp = tuple[int, int, int] | None


def stamps_of(weights: Sequence[WeakIdRef]) -> list[Stamp]:
    """None of a weight that lives no more. It is asked at each call, of all weights of a graph."""
    alive = map(_dereference, weights)
    return [
        None if t is None else (t._version, t.data_ptr(), t.untyped_storage()._cdata) for t in alive
    ]


def storages_of(weights: Sequence[WeakIdRef]) -> list[StorageWeakRef]:
    """To be kept with their stamps: no other storage is then where one of these was."""
    alive = map(_dereference, weights)
    return [StorageWeakRef(t.untyped_storage()) for t in alive if t is not None]


# Without what WeakIdRef does in Python for tensors whose Python object had died: those of a module
# have not, and the ones that had are asked for nothing but these numbers.
_dereference: Callable[[WeakIdRef], Tensor | None] = weakref.ref.__call__


@dataclass(frozen=True)
class WeightExpression:
    """What a node computes from weights alone.

    Attributes:
        key: equal for equal computations.
        compute: of the weights, the node's results.
        weights: in the order in which ``compute`` takes them.
    """

    key: str
    compute: Callable[..., tuple[Tensor, ...]]
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, node: fx.Node, weights: Mapping[fx.Node, Tensor]) -> WeightExpression | None:
        """None where the node is computed from anything else.

        Args:
            weights: by the graph's input.
        """
        nodes = sorted({node, *ancestors(node)})
        inputs = [n for n in nodes if n.op == "placeholder"]
        calls = [n for n in nodes if n.op == "call_function"]
        if len(inputs) + len(calls) != len(nodes) or len(nodes) > _MAX_NODES:
            return None
        if not inputs or not all(n in weights for n in inputs) or not all(map(_is_pure, calls)):
            return None
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for i, source in enumerate(inputs):
            copies[source] = graph.placeholder(f"weight_{i}")
        for i, source in enumerate(calls):
            args, kwargs = fx.map_arg((source.args, source.kwargs), copies.__getitem__)
            made = graph.create_node("call_function", source.target, args, kwargs, f"step_{i}")
            copies[source] = made
        graph.output(copies[node])
        run = fx.GraphModule({}, graph)

        def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
            # Not as inference tensors, which nothing could write into later.
            with torch.inference_mode(False), real_tensors():
                result: Any = run(*tensors)
            return result if isinstance(result, tuple) else (result,)

        return cls(str(graph), compute, tuple(weights[n] for n in inputs))


def _is_pure(node: fx.Node) -> bool:
    """Of tensors alone, and the same each time."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    return all("val" in n.meta and _holds_tensors(n) for n in node.all_input_nodes)


def _holds_tensors(node: fx.Node) -> bool:
    return tensor_of(node) is not None or isinstance(node.meta["val"], (tuple, list))


class SharedCast:
    """Results of an expression of weights, which are held weakly.

    Attributes:
        results: contiguous tensors that stay where they are.
    """

    def __init__(self, expression: WeightExpression) -> None:
        self._compute = expression.compute
        self.weights = tuple(map(WeakIdRef, expression.weights))
        self._stamps = stamps_of(self.weights)
        self._storages = storages_of(self.weights)
        self.results = self._compute(*expression.weights)

    def refresh(self, always: bool = False) -> None:
        """Compute it anew where a weight was written to since.

        Args:
            always: also where nothing tells that one was: ``weight.data`` counts no writes.

        Raises:
            InvalidOptionsError: it has another shape, dtype or device now.
        """
        stamps = stamps_of(self.weights)
        if None in stamps or (stamps == self._stamps and not always):
            return
        with _lock:
            for old, new in zip(self.results, self._compute(*self._alive()), strict=True):
                if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                    raise InvalidOptionsError(
                        "freezing=True: a weight was moved or has another shape or dtype since it "
                        f"was compiled (its cast was {old.dtype}{list(old.shape)} on {old.device}, "
                        f"now {new.dtype}{list(new.shape)} on {new.device}): call "
                        "torch._dynamo.reset() and compile again"
                    )
                with torch.inference_mode(False), real_tensors():
                    old.copy_(new)
            self._stamps, self._storages = stamps, storages_of(self.weights)

    def _alive(self) -> list[Tensor]:
        return [tensor for weight in self.weights if (tensor := weight()) is not None]


_lock = threading.RLock()
_casts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def shared_cast(expression: WeightExpression) -> SharedCast:
    """The one of all graphs; up to date."""
    weight = max(expression.weights, key=Tensor.numel)
    others = tuple(WeakIdRef(w) for w in expression.weights)
    with _lock:
        of_weight: dict[Any, SharedCast] = _casts.setdefault(weight, {})
        for key in [key for key, cast in of_weight.items() if _is_dead(cast.weights)]:
            del of_weight[key]
        key = (expression.key, others)
        if key in of_weight:
            of_weight[key].refresh(always=True)
        else:
            of_weight[key] = SharedCast(expression)
        return of_weight[key]


def shared_casts() -> Iterable[SharedCast]:
    """All that there are."""
    return [cast for of_weight in _casts.values() for cast in of_weight.values()]


def _is_dead(weights: Sequence[WeakIdRef]) -> bool:
    return any(weight() is None for weight in weights)
