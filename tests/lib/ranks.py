"""One rank of a data-parallel run whose linears round at random; prints what its gradients were.

``python ranks.py RANK WORLD_SIZE STORE``, where STORE is a file that all ranks meet in.
"""

# No deferred annotations: DDP compares those of its hooks with types.

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {"inner": "aot_eager", "recipe": "mxfp4-rht-sr", "quantize": "all"}


class Model(nn.Module):
    """Of a class of its own: of torch's containers inside of DDP Dynamo compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def main(rank: int, world_size: int, store: str) -> None:
    with _group(rank, world_size, store):
        torch.manual_seed(0)
        model = Model()
        x = torch.randn(64, 64)
        parallel = DistributedDataParallel(model)
        compiled = torch.compile(parallel, backend="mxnorm", options=OPTIONS)
        own: list[Tensor] = []
        parallel.register_comm_hook(own, _average)
        averaged = [_gradient(compiled, model, x) for _ in range(2)]
        gradients = {"own": own[0], "own again": own[1], "averaged": averaged[0]}
        print(json.dumps({name: gradient.tolist() for name, gradient in gradients.items()}))


@contextmanager
def _group(rank: int, world_size: int, store: str) -> Iterator[None]:
    meeting = dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _average(seen: list[Tensor], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Keep the rank's own gradients, and average them."""
    seen.append(_of_linear(bucket))
    return default_hooks.allreduce_hook(None, bucket)


def _of_linear(bucket: dist.GradBucket) -> Tensor:
    (gradient,) = (g for g in bucket.gradients() if g.ndim == 2)
    return gradient.clone().flatten()


def _gradient(compiled: Any, model: Model, x: Tensor) -> Tensor:
    """Of the linear's weight, with the same seed on every rank."""
    torch.manual_seed(1)
    model.zero_grad()
    compiled(x).square().sum().backward()
    assert model.linear.weight.grad is not None
    return model.linear.weight.grad.clone().flatten()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
