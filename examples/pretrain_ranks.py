"""The ranks of a pre-training run: FSDP2 under torchrun, or one process alone.

Every rank reads the whole text and has the same random state; it computes its rows of each batch
with its part of the parameters. Losses, gradient norms and checkpoints are those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from checkpointlib import BadInput
from pretrain_settings import NO_CASTS, Run, backend_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

import mxnorm_pass


def count() -> int:
    return dist.get_world_size() if _is_joined() else 1


def is_first() -> bool:
    """Whether this is the rank that writes; one process alone is."""
    return not _is_joined() or dist.get_rank() == 0


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(run: Run) -> Iterator[None]:
    """As a rank of torchrun's, with a GPU of its own. Without torchrun nothing happens.

    Raises:
        BadInput: the run cannot be split over so many ranks.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    check(run, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    on_gpu = run.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    yield
    # Not after an error: the other ranks may wait for this one, and torchrun ends them.
    dist.destroy_process_group()


def check(run: Run, ranks: int, ranks_here: int) -> None:
    """Before any rank waits for another.

    Args:
        ranks_here: on this machine.

    Raises:
        BadInput: the batch cannot be split, or there is no GPU for each rank.
    """
    if run.batch % ranks:
        raise BadInput(
            f"a batch of {run.batch} rows cannot be split evenly over {ranks} ranks: give --batch "
            f"a multiple of {ranks}, or torchrun another --nproc-per-node"
        )
    if run.device == "cpu":
        return
    if run.device != "cuda":
        raise BadInput(f"device {run.device!r}: each rank takes a GPU of its own; use device cuda")
    gpus = torch.cuda.device_count()
    if gpus < ranks_here:
        raise BadInput(
            f"{ranks_here} ranks on a machine where torch finds {gpus} GPUs, and each needs its "
            f"own: use --nproc-per-node {gpus}, or --device cpu"
        )


def compiled(model: nn.Module, run: Run) -> Any:
    """What is called to train the model: of several ranks itself, sharded and compiled by layers.

    FSDP's hooks, which gather parameters, would break a graph of the whole model.
    """
    if count() == 1:
        chosen = backend_of(run)
        return torch.compile(model, backend=chosen.backend, options=chosen.options, dynamic=False)
    shard(model, run.device)
    compile_layers(model, run)
    return model


def shard(model: nn.Module, device: str) -> None:
    """Split each layer's parameters, and those of the rest together, over the ranks.

    They are gathered in fp32, and gradients averaged in it: what computes in bf16 is autocast, as
    in one process.
    """
    mesh = init_device_mesh(device, (count(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compile_layers(model: nn.Module, run: Run) -> None:
    """In place, with the options of the run's arm."""
    chosen, layers = backend_of(run), layers_of(model)
    if run.recipe == NO_CASTS:
        for layer in layers:
            layer.compile(backend=chosen.backend, dynamic=False)
        return
    # Before torch 2.13 the layers share one limit.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(layers))
    # The rule for the head matches nothing in the layers.
    options = {key: value for key, value in (chosen.options or {}).items() if key != "modules"}
    mxnorm_pass.compile_layers(model, "model.layers.*", options=options, dynamic=False)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("model.layers").children())


def share(rows: Tensor) -> Tensor:
    """This rank's rows of a batch."""
    return rows.chunk(count())[dist.get_rank()] if _is_joined() else rows


def mean(value: Tensor) -> Tensor:
    """Over the ranks, each of which gets it. The device is not waited for."""
    if count() == 1:
        return value
    total = value.clone()
    # gloo knows no average.
    dist.all_reduce(total)
    return total / count()


def whole(value: Tensor) -> Tensor:
    """A value of a sharded model, on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as one process has it, on the CPU of the first rank; all ranks must call it.

    Of the others' it has no parameters.
    """

    def gather(value: DTensor) -> Tensor | None:
        full = value.full_tensor()
        return full.cpu() if is_first() else None

    found: dict[str, Any] = tree_map_only(DTensor, gather, state)
    return found


def load(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over "model" and "optimizer" of a state that any number of ranks wrote."""
    own = model.state_dict()
    model.load_state_dict({name: like(value, own[name]) for name, value in state["model"].items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": moments})


def like(value: Tensor, own: Tensor) -> Tensor:
    """Sharded as another of its shape is; each rank has it whole and takes its part."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def check_same_step(step: int | None) -> None:
    """Of the checkpoints that the ranks found; None: there is none.

    Raises:
        BadInput: they differ.
    """
    if count() == 1:
        return
    found: list[int | None] = [None] * count()
    dist.all_gather_object(found, step)
    if len(set(found)) > 1:
        raise BadInput(
            f"the ranks found checkpoints of steps {found}: give --checkpoint a folder that all of "
            "their machines see"
        )
