"""What the passes ask of FX graphs: who is a view, who computes the same, grafting."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    FakeTensor,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import make_fx, snapshot_fake
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
prims = torch.ops.prims

# Ops that keep the elements and their row-major order.
_VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten._reshape_alias.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)
# Of these the shape is the operand's, too.
_IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)
_TRANSPOSES = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
_DTYPE_CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype})
# Noted by this package where autograd's tracer has left no tag.
BACKWARD = "mxnorm_pass.backward"
_ORIGIN_KEYS = (
    BACKWARD,
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "source_fn_stack",
    "from_node",
    "partitioner_tag",
    "recompute",
    "ac_graph_id",
    "custom",
    "autograd_backward",
)


def tensor_of(node: fx.Node) -> Tensor | None:
    """The fake tensor that stands for the node's value, None if it is no tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def makes_tensors(node: fx.Node) -> bool:
    """Is a tensor among what the node computes? Of one that says nothing, yes."""
    if "val" not in node.meta:
        return True
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta["val"]))


def dtype_of(node: Any) -> torch.dtype:
    """The dtype of a node that is known to hold a tensor."""
    value = tensor_of(node)
    assert value is not None, f"{node} holds no tensor"
    return value.dtype


def same_size(a: Any, b: Any) -> bool:
    """Equality of sizes that never adds a guard on a symbolic one."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def is_call(node: Any, targets: Iterable[Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_backward(node: fx.Node) -> bool:
    tag = node.meta.get("partitioner_tag")
    return tag in ("is_backward", "must_be_in_backward") or BACKWARD in node.meta


def partition_of(node: fx.Node) -> tuple[Any, ...]:
    """On which side the partitioner must put the node, whether and with what it is recomputed."""
    return tuple(node.meta.get(k) for k in ("partitioner_tag", "recompute", "ac_graph_id"))


def forward_users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not is_backward(user)]


def is_view(node: fx.Node) -> bool:
    """Does the node hold its first operand's elements in the same row-major order?"""
    if is_call(node, (aten.permute.default,)):
        # As einsum spells them, whether or not dimensions move.
        order = node.args[1]
        return [int(d) % len(order) for d in order] == list(range(len(order)))  # type: ignore
    if not is_call(node, _VIEWS):
        return False
    if node.target is not aten.expand.default:
        return True
    source, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    return source is not None and result is not None and same_size(source.numel(), result.numel())


def _is_identity(node: fx.Node) -> bool:
    return is_call(node, _IDENTITIES)


def is_expand(node: fx.Node) -> bool:
    return is_call(node, (aten.expand.default,))


def is_transpose(node: fx.Node) -> bool:
    """Does the node swap the dimensions of a matrix?"""
    value = tensor_of(node)
    if value is None or value.ndim != 2 or not is_call(node, _TRANSPOSES):
        return False
    if node.target is aten.permute.default:
        order = [int(d) % 2 for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return order == [1, 0]
    if node.target is aten.transpose.int:
        return int(node.args[1]) % 2 != int(node.args[2]) % 2  # type: ignore[arg-type]
    return True


def is_dtype_cast(node: fx.Node) -> bool:
    """Does the node only change the floating-point dtype of its first operand?"""
    if not is_call(node, _DTYPE_CASTS):
        return False
    source, result = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    return (
        source is not None
        and result is not None
        and source.device == result.device
        and source.dtype.is_floating_point
        and result.dtype.is_floating_point
    )


def strip(node: fx.Node, *through: Callable[[fx.Node], bool]) -> fx.Node:
    """The first ancestor along first operands that none of the predicates sees through."""
    while any(see(node) for see in through):
        node = node.args[0]  # type: ignore[assignment]
    return node


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that the node is computed from."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def ancestors_after(node: fx.Node, first: fx.Node) -> set[fx.Node]:
    """``node`` and all that it is computed from, as far as it stands at ``first`` or below."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found and node >= first:
            found.add(node)
            pending += node.all_input_nodes
    return found


_SAME_VALUE_DEPTH = 8


def same_value(a: Any, b: Any, depth: int = _SAME_VALUE_DEPTH) -> bool:
    """Are two nodes one, or equal computations of the same nodes? False where that is unclear."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and bool(a == b)
    a, b = strip(a, _is_identity), strip(b, _is_identity)
    if a is b:
        return True
    if depth == 0 or a.op != "call_function" or b.op != "call_function" or a.target != b.target:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    return (
        a.kwargs.keys() == b.kwargs.keys()
        and same_value(a.args, b.args, depth - 1)
        and all(same_value(a.kwargs[k], b.kwargs[k], depth - 1) for k in a.kwargs)
    )


def input_position(node: fx.Node) -> int | None:
    """Position of a graph input among those that AOTAutograd was given, None if it has none."""
    position = getattr(node.meta.get("desc"), "idx", None)
    return position if isinstance(position, int) else None


def copy_origin(source: fx.Node, target: fx.Node) -> None:
    """Say of ``target`` that it comes from where ``source`` comes from."""
    for key in _ORIGIN_KEYS:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Add a call at the graph's insertion point, with a fake value and ``like``'s origin."""
    node = graph.call_function(target, args)
    copy_origin(like, node)
    _run_fake(node, _fake_mode(like))
    return node


@contextmanager
def created_nodes(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """A list that fills with the nodes that are added to the graph meanwhile."""
    owner = owner_of(graph)
    created: list[fx.Node] = []
    hook = created.append
    owner._register_create_node_hook(hook)
    try:
        yield created
    finally:
        owner._unregister_create_node_hook(hook)


def owner_of(graph: fx.Graph) -> fx.GraphModule:
    """The module whose graph it is."""
    owner = graph.owning_module
    assert owner is not None, "the graph belongs to no module"
    return owner


def outputs_of(graph: fx.Graph, like: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    """One getitem node per output of a multi-output call."""
    return tuple(call(graph, like, operator.getitem, node, i) for i in range(len(node.meta["val"])))


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """A copy in a module of its own, which shares what the nodes' ``meta`` holds."""
    return fx.GraphModule(owner_of(graph), copy.deepcopy(graph)).graph


CONSTANT_PREFIX = "_mxnorm_constant_"


def constant(graph: fx.Graph, like: fx.Node, value: Tensor) -> fx.Node:
    """Add a tensor that is a constant of the graph, on the device of the node ``like``.

    It is a buffer of the module that owns the graph, named by its content: equal graphs get
    equal cache keys, and no two values share a name. Nodes read it through a ``lift_fresh_copy``,
    as in graphs that torch traces: fake tensor modes take real tensors nowhere else. What
    compiles or exports the graph calls :func:`unwrap_constants`.
    """
    device = like.meta["val"].device
    owner = owner_of(graph)
    with real_tensors():
        content = value.cpu().contiguous().numpy().tobytes()
        signature = repr((value.dtype, tuple(value.shape), device)).encode()
        name = f"{CONSTANT_PREFIX}{hashlib.sha256(signature + content).hexdigest()[:16]}"
        if not hasattr(owner, name):
            owner.register_buffer(name, value.to(device))
    node = graph.get_attr(name)
    copy_origin(like, node)
    node.meta["val"] = _fake_mode(like).from_tensor(getattr(owner, name), static_shapes=True)
    return call(graph, like, aten.lift_fresh_copy.default, node)


def unwrap_constants(graph: fx.Graph) -> None:
    """Let all read a constant itself and not a copy of it."""
    for node in graph.find_nodes(op="call_function", target=aten.lift_fresh_copy.default):
        source = node.args[0]
        if source.op == "get_attr" and str(source.target).startswith(CONSTANT_PREFIX):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


@contextmanager
def real_tensors() -> Iterator[None]:
    """Leave the fake mode under which graphs are compiled."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        yield


class SubgraphCache:
    """Traces functions to ATen once per signature and grafts the copies into a graph.

    Args:
        decompositions: for ``make_fx``; empty keeps the ops that the function calls.
    """

    def __init__(self, decompositions: Mapping[Any, Any] | None = None) -> None:
        self._decompositions = dict(decompositions or {})
        self._traced: dict[Any, fx.GraphModule] = {}

    def graft(
        self,
        graph: fx.Graph,
        before: fx.Node,
        function: Callable[..., Any],
        args: Sequence[Any],
        origin: fx.Node | None = None,
    ) -> Any:
        """Copy ``function(*args)`` in before a node and return its output node(s).

        Args:
            args: nodes, and constants that are passed through.
            origin: the node from which the copies say they come; None: ``before``.
        """
        like = origin or before
        traced = self._trace(function, args)
        inputs = iter([a for a in args if isinstance(a, fx.Node)])
        env: dict[fx.Node, fx.Node] = {}
        mode = _fake_mode(like, *[a for a in args if isinstance(a, fx.Node)])
        with graph.inserting_before(before):
            for node in traced.graph.nodes:
                if node.op == "placeholder":
                    env[node] = next(inputs)
                elif node.op == "output":
                    return fx.map_arg(node.args[0], lambda n: env[n])
                elif node.op == "get_attr":
                    env[node] = _inline_constant(graph, like, getattr(traced, node.target), mode)
                else:
                    copy = graph.node_copy(node, lambda n: env[n])
                    copy.meta = {}
                    copy_origin(like, copy)
                    _run_fake(copy, mode)
                    env[node] = copy
        raise AssertionError("a traced graph ends in an output node")

    def _trace(self, function: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
        key = (function, _signature(args))
        if key not in self._traced:
            nodes = [a for a in args if isinstance(a, fx.Node)]

            def on_tensors(*tensors: Tensor) -> Any:
                it = iter(tensors)
                return function(*[next(it) if isinstance(a, fx.Node) else a for a in args])

            values = [n.meta["val"] for n in nodes]
            # Some ops take symbolic sizes in their Python implementation only.
            with _fake_mode(*nodes), _undisturbed(values), enable_python_dispatcher():
                traced = make_fx(on_tensors, decomposition_table=self._decompositions)(*values)
            _drop_detaches(traced.graph)
            traced.graph.eliminate_dead_code()
            self._traced[key] = traced
        return self._traced[key]


@contextmanager
def _undisturbed(values: Iterable[Any]) -> Iterator[None]:
    """Keep the modes in which the user compiles out of a trace.

    Autocast adds casts; anomaly mode asks for the values of gradients.
    """
    devices = {tensor.device.type for value in values for tensor in _tensors(value)}
    with without_autocast(devices), torch.autograd.set_detect_anomaly(False):
        yield


def without_autocast(devices: Iterable[str]) -> ExitStack:
    """A context without autocast for these types of devices."""
    stack = ExitStack()
    for device in devices:
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _drop_detaches(graph: fx.Graph) -> None:
    """Autograd has left its mark on the trace; in a functional graph it means nothing."""
    for node in graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])


def _signature(arg: Any) -> Any:
    value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    if isinstance(value, Tensor):
        # Sizes may be symbolic, which must not be compared: that would add guards.
        return (value.dtype, value.device, *map(_size, value.shape), *map(_size, value.stride()))
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((k, _signature(v)) for k, v in value.items())
    return (type(value).__name__, value if isinstance(value, (int, float)) else str(value))


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else str(size)


def _inline_constant(graph: fx.Graph, like: fx.Node, value: Any, mode: Any) -> fx.Node:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise AssertionError(f"a traced function holds a constant that is no scalar: {value}")
    node = graph.call_function(
        aten.full.default,
        (list(value.shape), value.item()),
        {"dtype": value.dtype, "device": value.device, "pin_memory": False},
    )
    copy_origin(like, node)
    _run_fake(node, mode)
    return node


def _fake_mode(*nodes: fx.Node) -> Any:
    for node in nodes:
        for value in _tensors(node.meta.get("val")):
            mode = getattr(value, "fake_mode", None)
            if mode is not None:
                return mode
    raise AssertionError(f"no fake tensor among {nodes}")


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Tensor):
        yield value


def _run_fake(node: fx.Node, mode: Any) -> None:
    if node.target is operator.getitem:
        node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
        return
    if _may_alias(node.target):
        node.meta["val"] = _evaluate(node, mode)
        return
    # The layers of a model repeat the same calls; dispatching each to fake tensors would be most
    # of the pass's time.
    templates = _templates.setdefault(mode, {})
    key = (node.target, _signature(node.args), _signature(node.kwargs))
    if key in templates:
        node.meta["val"] = pytree.tree_map_only(Tensor, partial(_fresh, mode), templates[key])
    else:
        node.meta["val"] = templates[key] = _evaluate(node, mode)


_templates: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _may_alias(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def _evaluate(node: fx.Node, mode: Any) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode, torch.no_grad():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    # As in traced graphs: a fake tensor that is autograd's view of another cannot be pickled.
    return pytree.tree_map_only(FakeTensor, snapshot_fake, value)


def _fresh(mode: Any, like: Tensor) -> Tensor:
    """A fake tensor like ``like`` with a storage of its own: storages tell what aliases what."""
    with in_kernel_invocation_manager(mode):
        meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return FakeTensor(mode, meta, like.device)
