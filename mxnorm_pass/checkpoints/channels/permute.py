"""Permute the channels of a model's residual stream without changing what it computes.

Where the stream goes is read off the exported graph, not off names of modules, see
``dims``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from mxnorm_pass.checkpoints.channels.dims import ChannelSpaces, Dim
from mxnorm_pass.compilation.export import functional_program
from mxnorm_pass.errors import ChannelError
from mxnorm_pass.graph.modules import module_path

__all__ = ["inverse", "permute_channels", "stream_weights"]

# float64 logits may move by that much of the largest.
TOLERANCE = 1e-9
_STATE = (InputKind.PARAMETER, InputKind.BUFFER)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes ``order``: [D] int64."""
    return torch.argsort(order)


@torch.no_grad()
def permute_channels(
    model: nn.Module, order: Tensor, inputs: Sequence[Any] | Mapping[str, Any] | None = None
) -> None:
    """Put the residual stream's channels in another order, in place: new i is old ``order[i]``.

    Every weight on the stream is permuted along the dimensions that meet it (embeddings, gains,
    input columns, output rows and biases, head; tied weights once), gradients along with them, so
    that the model computes what it did. ``permute_channels(model, inverse(order))`` restores all
    bits. Do it before the model is compiled and before an optimizer is made, whose state stays as
    it is.

    The model is exported on small inputs to follow the stream; nothing is computed for that. To
    make sure, the graph then runs in float64 before and after, one weight at a time being
    converted, on the model's device: two forward passes of a few tokens, and memory for the
    largest weight in float64.

    Args:
        model: takes token ids [batch, length] int64 first, or what ``inputs`` says.
        order: [D] int64, a permutation.
        inputs: positional or keyword arguments to export the model with; of several ids.

    Raises:
        ValueError: ``order`` is no permutation of the stream's channels; the stream cannot be
            followed (the message names the op and the module); weights are quantised, adapters or
            not on this device; the float64 outputs moved by more than 1e-9 of the largest. The
            model is then as it was.
    """
    _check_order(order)
    _check_model(model)
    stream = _Stream.of(model, len(order), inputs)
    before = stream.float64_outputs()
    stream.permute(order)
    try:
        moved = _largest_change(before, stream.float64_outputs())
    except BaseException:
        stream.permute(inverse(order))
        raise
    if not moved <= TOLERANCE:
        stream.permute(inverse(order))
        raise ChannelError(
            f"permuting the channels of {type(model).__name__} moves its float64 outputs by "
            f"{moved:.1e} of the largest, more than {TOLERANCE:g}; the model is as it was"
        )


def stream_weights(
    model: nn.Module, width: int, inputs: Sequence[Any] | Mapping[str, Any] | None = None
) -> list[tuple[Tensor, tuple[int, ...]]]:
    """What :func:`permute_channels` would permute: weights, and their dimensions on the stream.

    Args:
        width: channels of the residual stream.
        inputs: see :func:`permute_channels`.

    Raises:
        ValueError: the stream cannot be followed.
    """
    _check_model(model)
    return list(_Stream.of(model, width, inputs).weights)


@dataclass(frozen=True)
class _Stream:
    """The weights on a residual stream, and the graph that they were found in.

    Attributes:
        weights: each tensor with the dimensions that run over the stream's channels.
        state: all tensors that the graph reads, by the placeholder's name.
        values: what each user input of the graph is.
    """

    program: ExportedProgram
    weights: tuple[tuple[Tensor, tuple[int, ...]], ...]
    state: Mapping[str, Tensor]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, width: int, inputs: Any) -> _Stream:
        args, kwargs = _arguments(model, inputs)
        with in_eval_mode(model):
            program = _export(model, args, kwargs)
        state = _state(model, program)
        spaces = _spaces(program, state)
        channels = _channels(spaces, width)
        _check_followed(channels, model)
        _check_unread(model, program, state, width)
        values = tuple(pytree.tree_leaves((args, kwargs)))
        return cls(program, tuple(_on_stream(spaces, program, state, channels)), state, values)

    def permute(self, order: Tensor) -> None:
        for weight, dims in self.weights:
            for tensor in (weight, weight.grad) if weight.grad is not None else (weight,):
                for dim in dims:
                    tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))

    def float64_outputs(self) -> list[Tensor]:
        values = iter(self.values)
        nodes = self.program.graph.find_nodes(op="placeholder")
        given = [self.state[n.name] if n.name in self.state else next(values) for n in nodes]
        outputs = _Float64(self.program.graph_module).run(*given, enable_io_processing=False)
        return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


class _Float64(fx.Interpreter):
    """Runs a graph with float64 in the place of every other floating-point dtype.

    Weights are converted where an op reads them, so that no two are there at once.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value


def _check_order(order: object) -> None:
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.ndim != 1:
        raise ChannelError(f"order is {order!r}; it must be an int64 tensor [D]")
    if not len(order) or not torch.equal(order.cpu().sort().values, torch.arange(len(order))):
        raise ChannelError(f"order is no permutation of the channels 0 to {len(order) - 1}")


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(module, "_orig_mod"):
            raise ChannelError(
                f"{name or type(model).__name__!r} is compiled already: permute the channels of "
                "the model first, then compile it"
            )
    if hasattr(model, "peft_config"):
        raise ChannelError(
            "the model has PEFT adapters, which would no longer fit its original weights: permute "
            "the channels of the base model, then add adapters, or merge them first "
            "(merge_and_unload())"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ChannelError(
                f"{name!r} is a {type(tensor).__name__}: permute the channels of the "
                "high-precision model, then quantise or shard it"
            )
        if tensor.is_meta:
            raise ChannelError(f"{name!r} is on the meta device: load the weights first")


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if inputs is not None:
        return tuple(inputs), {}
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else None
    # Sizes that no width of a model is likely to share; ids that every vocabulary has.
    ids = torch.arange(2 * 11, device=device).reshape(2, 11) % 7
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return (ids,), {"use_cache": False} if takes_cache else {}


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        return functional_program(torch.export.export(model, args, kwargs, strict=False))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ChannelError(
            f"the residual stream of {type(model).__name__} cannot be followed, since "
            f"torch.export fails on it: {reason}. If it takes other inputs than token ids, give "
            "`inputs`"
        ) from error


def _state(model: nn.Module, program: ExportedProgram) -> dict[str, Tensor]:
    """The model's own tensors, not the program's, by placeholder."""
    tensors: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in _STATE and spec.target in tensors:
            found[spec.arg.name] = tensors[spec.target]
        elif spec.target is not None and spec.target in program.constants:
            found[spec.arg.name] = program.constants[spec.target]
    return found


def _spaces(program: ExportedProgram, state: Mapping[str, Tensor]) -> ChannelSpaces:
    nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    by_tensor: dict[int, list[fx.Node]] = {}
    for name, tensor in state.items():
        by_tensor.setdefault(id(tensor), []).append(nodes[name])
    tied = [pair for group in by_tensor.values() for pair in pairwise(group)]
    specs = program.graph_signature.input_specs
    fixed = {nodes[s.arg.name] for s in specs if s.kind not in _STATE and s.arg.name in nodes}
    return ChannelSpaces(program.graph, tied, fixed)


def _channels(spaces: ChannelSpaces, width: int) -> Dim:
    """The channels of the embedding, where the stream begins."""
    widths = {node.meta["val"].shape[-1] for node, _ in spaces.embeddings}
    streams = {d.root() for node, d in spaces.embeddings if node.meta["val"].shape[-1] == width}
    if not streams:
        found = f"embeddings of width {sorted(widths)}" if widths else "no embedding"
        raise ChannelError(f"order has {width} channels, and the model has {found}")
    if len(streams) > 1:
        raise ChannelError(f"the model has {len(streams)} separate streams of {width} channels")
    return streams.pop()


def _check_followed(channels: Dim, model: nn.Module) -> None:
    node = channels.pinned_by
    if node is None:
        return
    if node.op == "output":
        raise ChannelError(
            f"{type(model).__name__} returns its residual stream, whose order callers would see: "
            "permute the model with its head"
        )
    where = module_path(node)
    raise ChannelError(
        f"the residual stream cannot be followed through {node.target} ({node.name}"
        + (f" in {where!r})" if where else ")")
        + ": it depends on the order of the channels, or is unknown"
    )


def _check_unread(
    model: nn.Module, program: ExportedProgram, state: Mapping[str, Tensor], width: int
) -> None:
    inputs = program.graph.find_nodes(op="placeholder")
    read = {id(state[node.name]) for node in inputs if node.users and node.name in state}
    for name, tensor in model.named_parameters():
        if id(tensor) not in read and width in tensor.shape:
            raise ChannelError(
                f"{name!r} has a dimension of {width} and is read by nothing in the model's graph "
                "on these inputs, so whether it is on the residual stream is unknown"
            )


def _on_stream(
    spaces: ChannelSpaces,
    program: ExportedProgram,
    state: Mapping[str, Tensor],
    channels: Dim,
) -> Iterable[tuple[Tensor, tuple[int, ...]]]:
    seen: set[int] = set()
    storages: set[int] = set()
    for node in program.graph.find_nodes(op="placeholder"):
        dims = tuple(i for i, d in enumerate(spaces.of(node)) if d.root() is channels.root())
        tensor = state.get(node.name)
        if not dims or tensor is None or id(tensor) in seen:
            continue
        if not tensor.is_floating_point():
            raise ChannelError(f"{node.name} on the residual stream is of {tensor.dtype}")
        if tensor.untyped_storage().data_ptr() in storages:
            raise ChannelError(f"{node.name} shares its memory with another weight of the stream")
        seen.add(id(tensor))
        storages.add(tensor.untyped_storage().data_ptr())
        yield tensor, dims


def _largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Relative to the largest output; NaN where an output is."""
    largest = max((float(t.abs().max()) for t in before if t.numel()), default=0.0)
    changes = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()]
    return max(changes, key=lambda c: (c != c, c), default=0.0) / (largest or 1.0)
